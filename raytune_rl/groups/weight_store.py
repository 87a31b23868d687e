"""The weight store as the pipelines see it: it is started anew where it is lost, with the newest version."""

from __future__ import annotations

import threading
import time
from typing import Any

from raytune_rl.errors import DeadlineExceededError, RaytuneError, WorkerDiedError
from raytune_rl.groups.restarts import RecoveryRules
from raytune_rl.protocol.faults import Fault
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.group import end
from raytune_rl.runtime.wait import Pending, fetch
from raytune_rl.runtime.weights import start_store

LOOKED_AT_EVERY_S = 2.0
"""Engines that pull wait for a store that is gone, and nobody else may be speaking with it."""
NAMED = "the weight store"
LOSSES = (WorkerDiedError, DeadlineExceededError)


class WeightStore:
    """Where published versions are found by whoever wants to load one.

    Args:
        name: By which all processes of the cluster find it.
        keep: Versions to keep.
        timeout_s: Deadline of its start, seconds.
        rules: How a loss is treated.
    """

    def __init__(self, name: str, keep: int, timeout_s: float, rules: RecoveryRules) -> None:
        self._name, self._keep, self._timeout_s, self._rules = name, keep, timeout_s, rules
        self._actor: Any = start_store(name, keep)
        self._serves = False
        self._newest: Manifest | None = None
        self._given_up: RaytuneError | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="weight store", daemon=True).start()

    def publish(self, manifest: Manifest) -> None:
        """Makes a version the newest."""
        with self._lock:
            self._newest = manifest
            if self._given_up is not None:
                raise self._given_up
            try:
                self._tell(manifest)
            except LOSSES as error:
                self._start_anew(f"publishing weights {manifest.version}", error)

    def end(self) -> None:
        """Ends its process."""
        self._ended.set()
        end(self._actor)  # nobody waits for its answer then
        with self._lock:
            end(self._actor)

    def _tell(self, manifest: Manifest) -> None:
        self._answer(self._actor.publish.remote(manifest), "publishing")

    def _answer(self, ref: Any, what: str) -> None:
        """Waits for an answer; whoever has given none yet may only be starting."""
        hangs_after_s = self._rules.hang_timeout_s if self._serves else 0
        fetch(Pending(ref, NAMED, what, min(self._timeout_s, hangs_after_s or self._timeout_s)))
        self._serves = True

    def _start_anew(self, phase: str, loss: Exception) -> None:
        """It holds references alone, and the driver has them too."""
        began = time.monotonic()
        end(self._actor)  # it may hang
        reason = str(loss).partition("\n")[0].rstrip(".")
        fault = Fault(time.time(), "weight_store", NAMED, phase, f"{reason}.")
        attempt = 1
        while True:
            time.sleep(self._rules.budget.spend(fault, attempt))
            try:
                self._actor, self._serves = self._started(), False
                if self._newest is not None:
                    self._tell(self._newest)
                break
            except LOSSES:
                attempt += 1
        remedy = "It is started anew, with the newest version."
        self._rules.say(f"Note: {fault.loss} {remedy}")
        seconds = time.monotonic() - began
        self._rules.tell(Fault(fault.when, fault.group, fault.who, phase, fault.loss, remedy, seconds, ""))

    def _started(self) -> Any:
        """The name is free a moment after who had it has died."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return start_store(self._name, self._keep)
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _watch(self) -> None:
        while not self._ended.wait(LOOKED_AT_EVERY_S):
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self._answer(self._actor.ping.remote(), "answering")
                except LOSSES as error:
                    if self._ended.is_set():
                        return
                    try:
                        self._start_anew("holding the newest version", error)
                    except RaytuneError as end_of_it:
                        self._given_up = end_of_it
                        return
