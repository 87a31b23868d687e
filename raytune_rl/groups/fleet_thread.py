"""The thread in which a fleet lives: it goes on dispatching while the controller trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from raytune_rl.errors import DeadlineExceededError, WorkerDiedError
from raytune_rl.groups.elastic import Elastic
from raytune_rl.groups.fleet_core import FleetCore
from raytune_rl.groups.members import Crew, GroupCall
from raytune_rl.protocol.tickets import FleetLoad, InFlight, ServeReport, Ticket
from raytune_rl.runtime.fleet_health import Limits

TICK_S = 0.5
CLOSE_S = 10.0
"""Seconds that the thread may take to end; it does not outlive the process."""
Answer = TypeVar("Answer")
Command = Callable[[FleetCore, float], None]


class FleetThread:
    """Runs a `FleetCore`.

    Args:
        crew: Where members come from; all of them are started already, or are being started.
        limits: Of their health.
        lost: Told a sentence at each loss, from this thread.
        timeout_s: Deadline of what is waited for here, seconds.
        elastic: Makes what keeps the fleet's size, where members come and go.
    """

    def __init__(
        self,
        crew: Crew,
        limits: Limits,
        lost: Callable[[str], None],
        timeout_s: float,
        elastic: Callable[[FleetCore], Elastic] | None = None,
    ) -> None:
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._timeout_s = timeout_s
        core = FleetCore(crew, limits, self._inbox.put, lost)
        core.elastic = None if elastic is None else elastic(core)
        self._inbox.put(lambda core, now: core.begin(len(crew), now))
        self._thread = threading.Thread(target=self._run, args=(core,), name="fleet", daemon=True)
        self._thread.start()

    def _run(self, core: FleetCore) -> None:
        due = time.monotonic() + TICK_S
        while True:
            try:
                command = self._inbox.get(timeout=max(due - time.monotonic(), 0.0))
                if command is None:
                    if core.elastic is not None:
                        core.elastic.end()
                    core.fail(WorkerDiedError("the fleet was shut down"))
                    return
                self._try(core, command)
                if time.monotonic() < due + TICK_S:
                    continue
            except Empty:
                pass  # so all that members told was taken in before the clock is looked at
            self._try(core, FleetCore.tick)
            due = time.monotonic() + TICK_S

    def _try(self, core: FleetCore, command: Command) -> None:
        try:
            command(core, time.monotonic())
        except Exception as error:  # noqa: BLE001, whoever waits for the fleet gets it
            core.fail(error)

    def submit(self, calls: Sequence[GroupCall]) -> None:
        """Asks prompts."""
        self._inbox.put(lambda core, now: core.submit(calls, now))

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Nobody wants a prompt any more."""
        self._inbox.put(lambda core, now: core.cancel(ticket, reason, now))

    def resize(self, members: int) -> None:
        """As many members."""
        self._inbox.put(lambda core, now: core.resize(members, now))

    def load(self) -> FleetLoad:
        """What it is doing."""
        told: Future[FleetLoad] = Future()
        self._inbox.put(lambda core, now: told.set_result(core.load(now)))
        return self._wait(told, "telling what it does")

    def serve(self, version: int, in_flight: InFlight, every: bool) -> ServeReport:
        """All members serve a version; waits for it."""
        done: Future[ServeReport] = Future()
        self._inbox.put(lambda core, now: core.serve(version, in_flight, every, done, now))
        return self._wait(done, f"pulling weights {version}")

    def ask(self, method: str) -> None:
        """Calls a method of every member; waits for it."""
        done: Future[list[object]] = Future()
        self._inbox.put(lambda core, now: core.ask(method, done, now))
        self._wait(done, method)

    def close(self) -> None:
        """Ends the thread; the members are the caller's, but for places of those that come and go."""
        self._inbox.put(None)
        self._thread.join(CLOSE_S)

    def _wait(self, future: Future[Answer], what: str) -> Answer:
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            raise DeadlineExceededError(
                f"The rollout fleet did not finish '{what}' within {self._timeout_s:.0f} s; a longer limit "
                "is set by --step_timeout."
            ) from None
