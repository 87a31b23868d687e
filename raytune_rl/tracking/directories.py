"""Directories that are whole or absent: written beside their place, synced, and then given their name."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from raytune_rl.tracking.files import fsync_path


def hidden(final: Path, kind: str) -> Path:
    """A hidden sibling of `final`: `tmp` for one being written, `old` for one being replaced."""
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(4)}")


def parse_hidden(path: Path) -> tuple[Path, str] | None:
    """The place and the kind that `hidden` was asked for; None for any other name."""
    match = re.fullmatch(r"\.(.+)\.(tmp|old)-[0-9a-f]+", path.name)
    return None if match is None else (path.with_name(match.group(1)), match.group(2))


def sync_tree(directory: Path) -> None:
    """Files first, then directories from the leaves up: an entry is durable only after what it points to."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


def publish(written: Path, final: Path) -> None:
    """Gives a written directory its name, in place of one that has it. If that fails, the old one is back.

    A rename cannot replace a directory that is not empty, so a kill in the middle may leave the old one under
    a hidden name; whoever cleans up puts it back.

    Raises:
        OSError: The file system refused.
    """
    old: Path | None = None
    if final.exists():
        old = hidden(final, "old")
        final.rename(old)
    try:
        written.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    fsync_path(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # what remains is cleaned at the next start
