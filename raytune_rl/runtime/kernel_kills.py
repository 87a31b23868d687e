"""Processes that the kernel killed for their memory, as this machine's control group counts them.

Of such a process nothing is left that could say so: Ray only knows that it ended.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PLACES = ("memory.events", "memory/memory.oom_control")
"""Files with a line `oom_kill N`, of control groups of version 2 and 1."""


def count(root: Path = ROOT) -> int | None:
    """Processes killed so far; None where nobody counts."""
    for place in PLACES:
        try:
            lines = (root / place).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        found = dict(line.split(maxsplit=1) for line in lines if " " in line)
        if found.get("oom_kill", "").isdigit():
            return int(found["oom_kill"])
    return None


@cache
def at_start() -> int | None:
    """The count as this was first asked."""
    return count()


def since_start() -> int:
    """Processes killed since `at_start` was first asked; 0 where nobody counts, or on another machine."""
    before, now = at_start(), count()
    return 0 if before is None or now is None else max(now - before, 0)
