"""Disks that are full or may only be read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(at: Path, kib: int) -> Iterator[None]:
    """A directory is a disk of so many KiB for the time of the block; only root may do that."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(at)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@contextmanager
def full(at: Path, but_kib: int) -> Iterator[None]:
    """A disk has no more than so many KiB left for the time of the block."""
    have = os.statvfs(at)
    rest = at / "rest"
    rest.write_bytes(bytes(max(0, have.f_bavail * have.f_frsize - but_kib * 1024)))
    try:
        yield
    finally:
        rest.unlink()


@contextmanager
def read_only(at: Path) -> Iterator[None]:
    """Nobody may write to a disk for the time of the block; no file of it may be open for that."""
    subprocess.run(["mount", "-o", "remount,ro", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(at)], check=True)
