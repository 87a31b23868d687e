"""A file that grows by lines, or records, of which each is there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from raytune_rl.tracking.unwritten import forgiven


class LineFile:
    """Appends to a file at once, without a buffer that would be tried again later. Lines that the file
    system refuses are counted (`tracking.unwritten`), and the ones after them are tried.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def append(self, lines: Sequence[str]) -> None:
        """Writes lines, each with its newline; all of them or none."""
        if lines:
            self.write("".join(lines).encode("utf-8", errors="backslashreplace"), len(lines))

    def write(self, data: bytes, lines: int = 1) -> None:
        """Writes bytes that belong together: all of them or none; `lines` are missing without them."""
        with forgiven(self._path, lines=lines):
            size, rest = os.fstat(self._file.fileno()).st_size, memoryview(data)
            try:
                while rest:
                    written = self._file.write(rest) or 0
                    if not written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                    rest = rest[written:]
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise

    def flush(self) -> None:
        """Nothing to do: there is no buffer."""

    def close(self) -> None:
        """Closes the file; a network file system may refuse only now."""
        with forgiven(self._path):
            self._file.close()
