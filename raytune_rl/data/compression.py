"""Compressed text files, read as a stream: memory holds a piece of them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

#: Suffix to the bytes that such a file begins with.
MAGIC: dict[str, bytes] = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
}

#: What reading a damaged file raises, besides `OSError`.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


class CompressionError(ValueError):
    """A file is not compressed as its name says."""


def suffixes(path: Path) -> tuple[str, str]:
    """The format and the compression of a file, by its name: `(".jsonl", ".gz")`; "" where there is
    none."""
    last = path.suffix.lower()
    if last not in MAGIC:
        return last, ""
    return path.with_suffix("").suffix.lower(), last


def bare_name(path: Path) -> str:
    """The file's name without both suffixes."""
    return Path(path.stem).stem if suffixes(path)[1] else path.stem


def opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed. One that is compressed under a plain name is known by its first bytes.

    Raises:
        OSError: It cannot be opened.
        CompressionError: It is not compressed as its suffix says.
    """
    raw = path.open("rb")
    head = raw.peek(max(map(len, MAGIC.values())))
    compression = suffixes(path)[1]
    if compression and not head.startswith(MAGIC[compression]):
        raw.close()
        what = f"no {compression} file, whatever its name says" if head else "empty"
        raise CompressionError(f"it is {what}; get it again, or name it as what it is")
    # A text does not begin with bytes that are no text; "BZh" may begin a CSV file's header.
    telling = (one for one, magic in MAGIC.items() if not magic.isascii() and head.startswith(magic))
    compression = compression or next(telling, "")
    if not compression:
        return raw
    raw.close()
    return BufferedReader(_OPENERS[compression](path))


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
