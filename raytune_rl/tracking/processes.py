"""Which process that is, so that it can be known again later, also after its number was given to another."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessId:
    """One process of one machine, for all time.

    Attributes:
        host: Name of the machine, for people.
        pid: The process's number, as it sees itself.
        started: When the process began, in clock ticks since the machine's start; "" where unknown.
        machine: The machine's present start (boot id) and the process's namespace: two processes with the
            same one can see each other. "" where unknown.
    """

    host: str
    pid: int
    started: str
    machine: str

    @classmethod
    def own(cls) -> ProcessId:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine())

    @property
    def is_visible(self) -> bool:
        """Whether a look from here tells if it lives: it is on this machine, and in the same container."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Whether it runs still. Only for one that `is_visible`."""
        return self.started != "" and _started(self.pid) == self.started

    @property
    def machine_name(self) -> str:
        """The machine in eight hexadecimal digits."""
        return hashlib.sha256(self.machine.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """A beginning for the names of files that go with this process."""
        return f"raytune_rl-{self.machine_name}-{self.pid}-{self.started or 0}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _started(pid: int) -> str:
    """Field 22 of /proc/PID/stat; "" if there is no such process, or only its entry is left."""
    try:
        # The name before it may hold anything, blanks and parentheses too.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return ""
    state, *rest = fields.split()
    return "" if state in ("Z", "X") else rest[18]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
