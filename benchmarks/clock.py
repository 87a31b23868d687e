"""What a benchmark takes time with: the clock on the wall, or the CPU-seconds of all that it started.

On a machine that others use the wall measures them too. CPU-seconds (user and system) of this process and of
everything below it, which is Ray's daemons and workers and peers in processes of their own, are disturbed far
less; what sleeps or waits costs nothing in them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import psutil

SIZES = "raytune_rl.groups.sizes"
RAY = "ray::"
"""How the names of Ray's workers begin."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Gives a benchmark `--cpu_seconds`."""
    parser.add_argument(
        "--cpu_seconds",
        action="store_true",
        help="count CPU-seconds of all processes instead of seconds: on one core, with one thread a worker, "
        "and Ray's workers at nice 0 instead of 15",
    )


class Clock:
    """Tells the time.

    Args:
        cpu: CPU-seconds of the process and its descendants instead of the wall's.
        root: The process; this one unless given.

    Attributes:
        cpu: As given.
        unit: What `now` counts.
    """

    def __init__(self, cpu: bool, root: int | None = None) -> None:
        self.unit = "CPU-s" if cpu else "s"
        self.cpu, self._root = cpu, psutil.Process(root)
        self._seen: dict[psutil.Process, tuple[str, float]] = {}

    def now(self) -> float:
        """Seconds, to be subtracted from each other."""
        return sum(self.by_process().values()) if self.cpu else time.perf_counter()

    def by_process(self) -> dict[str, float]:
        """CPU-seconds so far by what a process calls itself. A process that has ended is in the time of its
        parent, which waited for it; Ray's daemon does not, so its workers count with what they had when they
        were last looked at.
        """
        now = {process: seen for process in self._alive() if (seen := _look(process))}
        gone = {p: seen for p, seen in self._seen.items() if p not in now and seen[0].startswith(RAY)}
        self._seen = gone | now
        found: dict[str, float] = {}
        for name, seconds in self._seen.values():
            found[name] = found.get(name, 0.0) + seconds
        return found

    def _alive(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []


def _look(process: psutil.Process) -> tuple[str, float] | None:
    """Name and CPU-seconds, of children that it waited for too; None if it ended just now."""
    try:
        spent, words = process.cpu_times(), process.cmdline()
    except psutil.Error:
        return None
    return _name(words), sum(spent[:4])


def _name(words: list[str]) -> str:
    """What a process calls itself, or its program's file."""
    title = words[0] if words else ""
    if title.startswith(RAY):
        return title.partition(".")[0]
    name = title.rpartition("/")[2]
    if not name.startswith("python") or "-c" in words[1:2]:
        return name
    return next((word.rpartition("/")[2] for word in words[1:] if not word.startswith("-")), name)


@contextmanager
def measuring(options: argparse.Namespace) -> Iterator[Clock]:
    """The clock that the flag asks for. Where CPU-seconds count, this process and all that it starts has one
    core and one thread a worker inside the block: threads that wait for each other spin, which costs as much
    as work. Ray starts workers at nice 15, behind everything else on the machine; here they are at 0, as
    peers are. For before Ray is started.
    """
    with ExitStack() as stack:
        if options.cpu_seconds:
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})
            stack.callback(os.sched_setaffinity, 0, cores)
            alone: dict[str, Any] = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
            stack.enter_context(mock.patch.dict(os.environ, alone))
            if SIZES in sys.modules:
                stack.enter_context(mock.patch(f"{SIZES}._threads", return_value=1))
        yield Clock(options.cpu_seconds)
