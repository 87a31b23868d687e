"""Files that are whole or absent, and JSON lines that survive a kill in the middle of a line."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Forces a file's bytes, or a directory's entries, onto the disk.

    Some network file systems cannot sync a directory; there the rename itself is the only guarantee there is.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    fsync_path(path.parent)


def follow_umask(file: Path) -> None:
    """Gives a file the permissions of any new one: safetensors lets only its owner read it."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def in_short(value: Any) -> str:
    """The form in a file of a value of the user's that JSON does not know."""
    return f"<{len(value)} bytes>" if isinstance(value, (bytes, bytearray)) else str(value)[:200]


def plain(value: Any, odd: Callable[[Any], Any] = _refuse) -> Any:
    """Numpy scalars, paths, enums, sets and tuples as what JSON knows; non-finite floats become null.

    Args:
        value: What is to be written.
        odd: What becomes of a value that JSON does not know; by default a TypeError.
    """
    if isinstance(value, Enum):
        return plain(value.value, odd)
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, odd) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, odd) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item, odd) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist(), odd)
    return odd(value)


def json_line(row: Mapping[str, Any], odd: Callable[[Any], Any] = _refuse) -> str:
    """One row as strictly valid JSON (no NaN, no Infinity), ending in a newline; `odd` as in `plain`."""
    return json.dumps(plain(row, odd), ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON lines file, without a line torn by a kill. An absent file has no rows."""
    rows, _ = _parse(path)
    return [row for _, row in rows]


@dataclass(frozen=True)
class Truncation:
    """The result of `truncate_jsonl`, in lines: kept, dropped as refused, dropped as torn (not whole
    JSON).
    """

    kept: int
    dropped: int
    torn: int


def truncate_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> Truncation:
    """Rewrites a JSON lines file atomically with the rows that `keep` accepts, byte for byte as they were."""
    rows, torn = _parse(path)
    kept = [line for line, row in rows if keep(row)]
    if torn or len(kept) < len(rows):
        write_atomic(path, "".join(kept))
    return Truncation(len(kept), len(rows) - len(kept), torn)


def _parse(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    if not path.exists():
        return [], 0
    rows: list[tuple[str, dict[str, Any]]] = []
    torn = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            # A line without its newline was being written when the process died, even if what is there
            # parses.
            if isinstance(row, dict) and line.endswith("\n"):
                rows.append((line, row))
            else:
                torn += 1
    return rows, torn
