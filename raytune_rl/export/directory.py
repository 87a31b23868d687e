"""A directory that is whole or absent: written beside its target, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from raytune_rl.export.errors import ExportError
from raytune_rl.tracking.directories import hidden, parse_hidden, publish, sync_tree

# A file that is missing is one that the body wanted to read.
_NOT_OURS = (None, errno.ENOENT)


def check_target(target: Path, overwrite: bool) -> None:
    """Whether `target` may be written; asked before any work is done.

    Raises:
        ExportError: it exists and `overwrite` is off, or is something that no export has written.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"{target} exists. Pass --exist_ok true to replace it, or another --output_dir.")
    if not (target / "config.json").is_file():
        # One mistyped --output_dir must not cost a home directory.
        raise ExportError(
            f"{target} is not a model (it has no config.json), so --exist_ok true does not replace it. "
            "Remove it yourself, or pass another --output_dir."
        )


@contextlib.contextmanager
def whole_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """`with whole_directory(target, overwrite=False) as path:` and write into `path`.

    When the body ends, all is synced to disk and `path` becomes `target`, replacing it if `overwrite` is
    on. If the body raises (Ctrl-C and SIGTERM too), nothing remains and an old `target` is untouched. What
    SIGKILL leaves is a hidden sibling, which the next export to the same target removes.

    Raises:
        ExportError: as in `check_target`, or the file system refused.
    """
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target)
        aside = hidden(target, "tmp")
        aside.mkdir()
    except OSError as error:
        raise _refused(target, error) from error
    with _locked(aside):
        try:
            with _sigterm_raises():
                yield aside
            sync_tree(aside)
            check_target(target, overwrite)  # somebody else may have written it in the meantime
            publish(aside, target)
        except OSError as error:
            if error.errno in _NOT_OURS:
                raise
            raise _refused(target, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def clean_leftovers(target: Path) -> None:
    """Removes what killed exports to `target` left, and puts an old target back that was being replaced.

    A directory that a living process is writing is locked, and left alone.
    """
    for path in sorted(target.parent.iterdir()):
        parsed = parse_hidden(path)
        if parsed is None or parsed[0] != target or _is_locked(path):
            continue
        if parsed[1] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _refused(target: Path, error: OSError) -> ExportError:
    where = f" ({error.filename})" if error.filename else ""
    return ExportError(
        f"{target} cannot be written: {error.strerror or error}{where}. Nothing of it remains."
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks; see `_is_locked`
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_locked(directory: Path) -> bool:
    """True also where locks do not work: then nothing is known to be dead, and nothing is removed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """By default SIGTERM ends Python without clean-up; inside, it unwinds the stack as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
