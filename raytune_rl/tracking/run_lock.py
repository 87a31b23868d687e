"""One run directory, one process that writes into it.

The lock is a file that says who holds it. On the holder's own machine a look at its process tells whether it
still lives; elsewhere (a shared volume) the file's time does, which the holder renews. A holder that is gone,
however it ended, keeps nobody out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from raytune_rl.errors import RunInUseError
from raytune_rl.tracking.processes import ProcessId

LOCK = "run.lock"
RENEWED_EVERY_S = 10.0
STALE_AFTER_S = 60.0
"""Without a renewal for so long, by the file system's own clock, a holder on another machine is gone."""
GUARDED_S = 30.0


class RunLock:
    """Holds a run directory from `acquire` to `release`.

    Args:
        directory: The run directory; it must be there.
        renewed_every_s: Seconds between two signs of life.
        stale_after_s: Seconds without one after which a holder on another machine is gone.
    """

    def __init__(
        self,
        directory: Path,
        *,
        renewed_every_s: float = RENEWED_EVERY_S,
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        self._file = directory / LOCK
        self._every, self._stale = renewed_every_s, stale_after_s
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock, also from a holder that is gone.

        Raises:
            RunInUseError: Another process holds it and lives.
            OSError: The file system refused.
        """
        from filelock import FileLock, Timeout

        self.refuse_if_held()
        try:
            # Around looking and taking, or of two that find a stale lock the later would take the earlier's.
            with FileLock(self._file.with_name(f".{LOCK}"), timeout=GUARDED_S):
                self.refuse_if_held()
                self._write()
        except Timeout as error:
            raise RunInUseError(
                f"{self._file.parent} could not be locked within {GUARDED_S:.0f} s: other commands are "
                "starting there. Try again."
            ) from error
        self._renewing = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewing.start()

    def release(self) -> None:
        """Gives the lock back; one that was lost is the other's."""
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join(timeout=self._every)
            self._renewing = None
        with contextlib.suppress(OSError):
            if self._is_own():
                self._file.unlink()

    def refuse_if_held(self) -> None:
        """Looks only.

        Raises:
            RunInUseError: Another process holds the lock and lives.
        """
        if (holder := self._held_by()) is not None:
            raise RunInUseError(_in_use(self._file.parent, holder))

    def check(self) -> None:
        """To be called before something is written that another holder's writing would spoil.

        Raises:
            RunInUseError: Another command has taken the directory over, as this one gave no sign of life.
        """
        with contextlib.suppress(OSError):
            if self._is_own():
                return
        raise RunInUseError(
            f"{self._file.parent} was taken over by another command ({_who(_read(self._file))}) while this "
            "one gave no sign of life: nothing more is written by this one."
        )

    def _is_own(self) -> bool:
        return bool(_read(self._file).get("token") == self._token)

    def _write(self) -> None:
        own = ProcessId.own()
        document = {
            **own.as_dict(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": _command(),
            "token": self._token,
        }
        temporary = self._file.with_name(f".{LOCK}-{self._token}")
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._file)

    def _held_by(self) -> dict[str, Any] | None:
        """Who holds the lock and lives; waits for a sign of life of one on another machine."""
        until = time.monotonic() + self._stale
        first: int | None = None
        said = False
        while True:
            try:
                renewed = self._file.stat().st_mtime_ns
            except FileNotFoundError:
                return None
            holder = _read(self._file)
            who = _process(holder)
            if who is not None and who.is_visible:
                return holder if who.lives else None
            first = renewed if first is None else first
            if renewed != first:
                return holder
            age = self._now() - renewed / 1e9
            if age > self._stale or time.monotonic() > until:
                return None
            if not said:
                said = True
                print(
                    f"raytune-rl: {self._file} is of {_who(holder)}: waiting up to {self._stale:.0f} s for a "
                    "sign of life ...",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(1.0, self._every / 4))

    def _now(self) -> float:
        """The time by the clock that the lock's own time is by: a file server's may differ from ours."""
        probe = self._file.with_name(f".{LOCK}-{self._token}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._every):
            with contextlib.suppress(OSError):
                if not self._is_own():
                    return
                os.utime(self._file)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[RunLock]:
    """Holds the lock of a run directory for the time of the block; see `RunLock.acquire`."""
    lock = RunLock(directory)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _command() -> str:
    """The program and its command; flags may hold secrets."""
    program, *words = sys.argv or ["?"]
    return " ".join([Path(program).name, *(word for word in words[:1] if not word.startswith("-"))])


def _read(file: Path) -> dict[str, Any]:
    """What a lock says; nothing if it cannot be understood."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _process(holder: dict[str, Any]) -> ProcessId | None:
    try:
        return ProcessId(
            str(holder["host"]), int(holder["pid"]), str(holder["started"]), str(holder["machine"])
        )
    except (KeyError, TypeError, ValueError):
        return None


def _who(holder: dict[str, Any]) -> str:
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}: "
        f"{holder.get('command', '?')}"
    )


def _in_use(directory: Path, holder: dict[str, Any]) -> str:
    return (
        f"{directory} is in use by another command ({_who(holder)}). Nothing was changed. Wait until it has "
        f"ended, or end it (kill {holder.get('pid', '?')} on {holder.get('host', '?')}; it saves first) and "
        "start again; a run beside it needs another --output_dir, or no --resume_from_checkpoint."
    )
