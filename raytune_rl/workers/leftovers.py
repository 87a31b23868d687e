"""What libraries leave on a machine when a worker is killed: named so that it can be told whose it was, and
cleared away by the next worker there.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import process, util
from pathlib import Path
from uuid import uuid4

from raytune_rl.runtime.machine import SHORT, short_folder
from raytune_rl.tracking.processes import ProcessId

SEMAPHORES = Path("/dev/shm")
_ROOM = len("/raytune_rl-01234567-1234567-1234567890-sockets-12345678/") + len(str(uuid4()))
"""Bytes of a socket's path below a temporary folder: vLLM names its own by a UUID."""
_NAME = re.compile(r"(?:sem\.)?raytune_rl-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-")


def name_semaphores() -> None:
    """From now on semaphores of multiprocessing bear the name of this process. Those of processes that are
    gone are removed.

    Python has no public way to choose the name.
    """
    clear(SEMAPHORES)
    process.current_process()._config["semprefix"] = f"/{ProcessId.own().name}"  # type: ignore[attr-defined]


def name_sockets() -> None:
    """From now on the sockets of multiprocessing, and those by which an engine's processes meet, lie in a
    folder that bears the name of this process. Those of processes that are gone are removed.

    Python has no public way to choose the folder; what the user has set for vLLM stays.
    """
    settings, name = process.current_process()._config, f"{ProcessId.own().name}-sockets-"  # type: ignore[attr-defined]
    if name in str(settings.get("tempdir")):
        return
    folder = short_folder(_ROOM)
    clear(folder)
    settings["tempdir"] = own = tempfile.mkdtemp(prefix=name, dir=folder)
    util.Finalize(None, shutil.rmtree, (own, True), exitpriority=-100)  # where it is not killed
    os.environ.setdefault("VLLM_RPC_BASE_PATH", own)


@contextmanager
def own_folder(what: str) -> Iterator[Path]:
    """A new folder for the time of the block. Those of processes that are gone are removed."""
    clear(temporary())
    with tempfile.TemporaryDirectory(
        prefix=f"{ProcessId.own().name}-{what}-", ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def temporary() -> Path:
    """Where files lie that nobody needs for long (`TMPDIR`)."""
    return Path(tempfile.gettempdir())


def places() -> tuple[Path, ...]:
    """All folders of this machine where something may be left."""
    return tuple(dict.fromkeys((SEMAPHORES, temporary(), SHORT)))


def file_store() -> str:
    """A new place for torch.distributed's meeting by a file, as an address."""
    folder = temporary()
    clear(folder)
    return f"file://{folder / f'{ProcessId.own().name}-store-{uuid4().hex}'}"


def clear(folder: Path) -> list[Path]:
    """Removes what processes of this machine left there that are gone, and returns it. What cannot be
    removed is another user's.
    """
    own, removed = ProcessId.own(), []
    for path in folder.glob("*raytune_rl-*"):
        found = _NAME.match(path.name)
        if found is None or found["machine"] != own.machine_name:
            continue
        owner = ProcessId(own.host, int(found["pid"]), found["started"], own.machine)
        if not owner.lives:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                removed.append(path)
    return removed


def named(folder: Path) -> set[str]:
    """Names there of what processes of this machine left, or have in use."""
    machine = ProcessId.own().machine_name
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
