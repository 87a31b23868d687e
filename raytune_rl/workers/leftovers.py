"""What libraries leave on a machine when a worker is killed: named so that it can be told whose it was, and
cleared away by the next worker there.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from multiprocessing import process
from pathlib import Path
from uuid import uuid4

from raytune_rl.tracking.processes import ProcessId

SEMAPHORES = Path("/dev/shm")
_NAME = re.compile(r"(?:sem\.)?raytune_rl-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-")


def name_semaphores() -> None:
    """From now on semaphores of multiprocessing bear the name of this process. Those of processes that are
    gone are removed.

    Python has no public way to choose the name.
    """
    clear(SEMAPHORES)
    process.current_process()._config["semprefix"] = f"/{_own()}"  # type: ignore[attr-defined]


def file_store() -> str:
    """A new place for torch.distributed's meeting by a file, as an address."""
    folder = Path(tempfile.gettempdir())
    clear(folder)
    return f"file://{folder / f'{_own()}-store-{uuid4().hex}'}"


def clear(folder: Path) -> list[Path]:
    """Removes what processes of this machine left there that are gone, and returns it. What cannot be
    removed is another user's.
    """
    own, removed = ProcessId.own(), []
    for path in folder.glob("*raytune_rl-*"):
        found = _NAME.match(path.name)
        if found is None or found["machine"] != _machine(own):
            continue
        owner = ProcessId(own.host, int(found["pid"]), found["started"], own.machine)
        if not owner.lives:
            try:
                path.unlink()
            except OSError:
                continue
            removed.append(path)
    return removed


def named(folder: Path) -> set[str]:
    """Names there of what processes of this machine left, or have in use."""
    machine = _machine(ProcessId.own())
    found = map(_NAME.match, (path.name for path in folder.glob("*raytune_rl-*")))
    return {one.string for one in found if one is not None and one["machine"] == machine}


def clear_new(folder: Path, before: set[str], within_s: float = 5.0) -> None:
    """Clears until nothing is left but what was there `before`: who was ended a moment ago may still be
    dying. Gives up after so many seconds, as a run beside this one has files there, too.
    """
    deadline = time.monotonic() + within_s
    clear(folder)
    while named(folder) - before and time.monotonic() < deadline:
        time.sleep(0.1)
        clear(folder)


def _own() -> str:
    own = ProcessId.own()
    return f"raytune_rl-{_machine(own)}-{os.getpid()}-{own.started or 0}"


def _machine(own: ProcessId) -> str:
    return hashlib.sha256(own.machine.encode()).hexdigest()[:8]
