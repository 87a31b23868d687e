"""Kills a chosen process of a run at a chosen moment, and counts what a run has left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from raytune_rl.groups.weight_store import WeightStore
from raytune_rl.pipelines.online import OnlineRun
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.workers.leftovers import places


@dataclass
class Strike:
    """A signal to one worker, once.

    Attributes:
        group, rank: Whom.
        method: As it is called by this method; or of the controller: "evaluate", or as the weight store is
            about to be told a version ("publishing") or has been ("published").
        version: The earliest newest weight version with which it happens; -1: from the start.
        signal: SIGKILL, or SIGSTOP for one that hangs.
        after_s: Seconds after the call was made.
        struck: Process ids, once it has happened.
    """

    group: str
    rank: int
    method: str
    version: int = -1
    signal: int = signal.SIGKILL
    after_s: float = 0.0
    struck: list[int] = field(default_factory=list)

    def hit(self, pid: int) -> None:
        self.struck.append(pid)
        os.kill(pid, self.signal)


class Striker:
    """Carries out strikes: stands between the controller and what it calls."""

    def __init__(self, strikes: Sequence[Strike]) -> None:
        self._owed = list(strikes)
        self._lock = threading.Lock()
        self._groups: dict[str, WorkerGroup] = {}
        self.version = -1

    def due(self, method: str, group: str | None = None, rank: int | None = None) -> list[Strike]:
        """Strikes that happen now; each is given once."""
        with self._lock:
            due = [
                one
                for one in self._owed
                if one.method == method
                and self.version >= one.version
                and (group is None or (one.group, one.rank) == (group, rank))
            ]
            self._owed = [one for one in self._owed if one not in due]
        return due

    def ask(self, plain: Any, group: WorkerGroup, rank: int, call: Any) -> Any:
        """A worker is asked for something."""
        self._groups[group.name] = group
        due = self.due(call.method, group.name, rank)
        pids = [process_of(group._actors[rank]) for _ in due]
        pending = plain(group, rank, call)
        for strike, pid in zip(due, pids, strict=True):
            threading.Timer(strike.after_s, strike.hit, (pid,)).start()
        return pending

    def evaluate(self, plain: Any, run: Any) -> None:
        """The controller evaluates; whom that does not ask for anything is lost meanwhile."""
        for strike in self.due("evaluate"):
            pid = process_of(self._groups[strike.group]._actors[strike.rank])
            threading.Timer(strike.after_s, strike.hit, (pid,)).start()
        plain(run)

    def publish(self, plain: Any, store: WeightStore, manifest: Any) -> None:
        """The store is told a version."""
        for strike in self.due("publishing"):
            strike.hit(process_of(store._actor))
        plain(store, manifest)
        self.version = manifest.version
        for strike in self.due("published"):
            strike.hit(process_of(store._actor))


@contextmanager
def struck(*strikes: Strike) -> Iterator[None]:
    """Within the block the strikes happen."""
    striker = Striker(strikes)
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (WorkerGroup, "_ask", striker.ask),
            (OnlineRun, "evaluate", striker.evaluate),
            (WeightStore, "publish", striker.publish),
        ):
            plain = getattr(owner, name)
            between = partialmethod(_between, stand_in, plain)
            stack.enter_context(mock.patch.object(owner, name, between))
        yield


def _between(self: Any, stand_in: Any, plain: Any, *args: Any) -> Any:
    return stand_in(plain, self, *args)


def process_of(actor: Any, timeout_s: float = 300.0) -> int:
    """The process id of an actor, as soon as it has one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        pid = ray._private.state.actors(actor._actor_id.hex()).get("Pid", 0)
        if pid:
            return int(pid)
        time.sleep(0.05)
    raise TimeoutError("the actor has no process")


@dataclass(frozen=True)
class Left:
    """What is there beside the cluster's own.

    Attributes:
        actors: Names of classes of living actors.
        groups: Placement groups that are not removed.
        shared: What lies in /dev/shm and the temporary folder, sockets too, and bears the process ids of
            actors of this cluster, past ones included.
        processes: Children of this session that are stopped or work for nobody.
    """

    actors: tuple[str, ...]
    groups: int
    shared: tuple[str, ...]
    processes: tuple[str, ...]


def left() -> Left:
    """What is there now."""
    states = ray._private.state.actors().values()
    actors = tuple(sorted(s["ActorClassName"] for s in states if s["State"] != "DEAD"))
    table = ray.util.placement_group_table().values()
    pids = {str(s["Pid"]) for s in states if s["Pid"]}
    names = [p.name for place in places() for p in place.iterdir() if "raytune_rl-" in p.name]
    shared = tuple(sorted(name for name in names if pids & set(name.split("-"))))
    return Left(actors, sum(g["state"] != "REMOVED" for g in table), shared, _workers())


def assert_nothing_left(before: Left) -> None:
    """A run has left nothing that was not there `before`, 15 s after its end at the latest.

    What was there may go meanwhile: of earlier tests' runs, say.
    """
    deadline = time.monotonic() + 15
    while (more := _beyond(left(), before)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert more == {}, f"left behind: {more}"


def _beyond(now: Left, before: Left) -> dict[str, Any]:
    """By name, what there is `now` and was not `before`."""
    more: dict[str, Any] = {"groups": now.groups - before.groups} if now.groups > before.groups else {}
    for name in ("actors", "shared", "processes"):
        new = Counter(getattr(now, name)) - Counter(getattr(before, name))
        if new:
            more[name] = sorted(new.elements())
    return more


def _workers() -> tuple[str, ...]:
    """Worker processes of Ray that still are actors, and engines' own children."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            parents = _ancestors(int(entry.name))
        except OSError:
            continue
        ours = os.getpid() in parents
        if ours and state != "Z" and ("Worker." in command or "EngineCore" in command):
            found.append(command)
    return tuple(sorted(found))


def _ancestors(pid: int) -> list[int]:
    """The process's parents, up to init."""
    chain = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain
