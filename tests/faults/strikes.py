"""Kills a chosen process of a run at a chosen moment, and counts what a run has left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from raytune_rl.runtime.group import WorkerGroup


@dataclass
class Strike:
    """A signal to one worker.

    Attributes:
        group, rank: Whom.
        method: Of what call.
        nth: Of how many such calls of this worker, from 1.
        signal: SIGKILL, or SIGSTOP for one that hangs.
        after_s: Seconds after the call was made; negative: before.
        struck: Process ids, once it has happened.
    """

    group: str
    rank: int
    method: str
    nth: int = 1
    signal: int = signal.SIGKILL
    after_s: float = 0.03
    struck: list[int] = field(default_factory=list)
    _calls: int = 0

    def due(self, group: str, rank: int, method: str) -> bool:
        if (group, rank, method) != (self.group, self.rank, self.method):
            return False
        self._calls += 1
        return self._calls == self.nth

    def hit(self, pid: int) -> None:
        self.struck.append(pid)
        os.kill(pid, self.signal)


@contextmanager
def struck(*strikes: Strike) -> Iterator[None]:
    """Within the block the strikes happen."""
    plain = WorkerGroup._ask

    def ask(group: WorkerGroup, rank: int, call: Any) -> Any:
        due = [s for s in strikes if s.due(group.name, rank, call.method)]
        pids = [process_of(group._actors[rank]) for _ in due]
        for strike, pid in zip(due, pids, strict=True):
            if strike.after_s < 0:
                strike.hit(pid)
        pending = plain(group, rank, call)
        for strike, pid in zip(due, pids, strict=True):
            if strike.after_s >= 0:
                threading.Timer(strike.after_s, strike.hit, (pid,)).start()
        return pending

    WorkerGroup._ask = ask  # type: ignore[method-assign]
    try:
        yield
    finally:
        WorkerGroup._ask = plain  # type: ignore[method-assign]


def process_of(actor: Any, timeout_s: float = 60.0) -> int:
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
        shared: Files in /dev/shm that bear the process ids of actors of this cluster, past ones included.
        processes: Children of this session that are stopped or work for nobody.
        sockets: Meeting files in the temporary folder.
    """

    actors: tuple[str, ...]
    groups: int
    shared: tuple[str, ...]
    processes: tuple[str, ...]
    sockets: tuple[str, ...]


def left() -> Left:
    """What is there now."""
    states = ray._private.state.actors().values()
    actors = tuple(sorted(s["ActorClassName"] for s in states if s["State"] != "DEAD"))
    table = ray.util.placement_group_table().values()
    pids = {str(s["Pid"]) for s in states if s["Pid"]}
    names = [p.name for p in Path("/dev/shm").iterdir() if "raytune_rl-" in p.name]
    shared = tuple(sorted(name for name in names if pids & set(name.split("-"))))
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    sockets = tuple(sorted(p.name for p in temporary.glob("*raytune*") if p.is_socket()))
    return Left(actors, sum(g["state"] != "REMOVED" for g in table), shared, _workers(), sockets)


def assert_nothing_left(before: Left) -> None:
    """A run has left nothing that was not there `before`, 15 s after its end at the latest.

    What was there may go meanwhile: of earlier tests' runs, say.
    """
    deadline = time.monotonic() + 15
    while (more := _beyond(left(), before)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert more == {}


def _beyond(now: Left, before: Left) -> dict[str, Any]:
    """By name, what there is `now` and was not `before`."""
    more: dict[str, Any] = {"groups": now.groups - before.groups} if now.groups > before.groups else {}
    for name in ("actors", "shared", "processes", "sockets"):
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
