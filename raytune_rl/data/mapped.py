"""Columns on disk: written row after row, read through memory maps.

A folder holds one `.npy` file an array, numpy's own format, readable without this program: `<column>.npy`, or
for a ragged column `<column>.values.npy` and `<column>.offsets.npy`. Whoever opens it reads from disk what he
looks at, and the operating system may forget it again.
"""

from __future__ import annotations

import secrets
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from raytune_rl.errors import DataError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.tracking.files import fsync_path

_VALUES, _OFFSETS = ".values", ".offsets"
ABANDONED_S = 7 * 86400.0
"""Age of an unfinished folder at which nobody is writing to it any more."""


class MappedColumns(dict[str, "Ragged | NDArray | list"]):
    """Columns that travel to another process of the machine as the name of their folder."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        super().__init__(columns)
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return open_columns, (str(self.folder),)


@lru_cache(maxsize=8)
def open_columns(folder: str) -> MappedColumns:
    """Maps the columns of a folder, read-only. A folder's content must not change once it has been opened.

    Raises:
        DataError: The folder is gone, or a file in it is not what it should be.
    """
    columns: Columns = {}
    try:
        arrays = {path.stem: _map(path) for path in sorted(Path(folder).glob("*.npy"))}
        for name, values in arrays.items():
            if name.endswith(_VALUES):
                column = name.removesuffix(_VALUES)
                columns[column] = Ragged(values, arrays[column + _OFFSETS])
            elif not name.endswith(_OFFSETS):
                columns[name] = values
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{folder}: the encoded rows cannot be read: {error}") from error
    if not columns:
        raise DataError(f"{folder}: there are no encoded rows any more; start the run anew")
    return MappedColumns(Path(folder), columns)


def _map(path: Path) -> NDArray:
    # As a plain array: `np.memmap` would be pickled by its content, not as a buffer beside the pickle.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


class ArrayWriter:
    """One array that grows: in a file, or in memory where there is no folder."""

    def __init__(self, name: str, dtype: DTypeLike, folder: Path | None) -> None:
        self._dtype = np.dtype(dtype)
        self._parts: list[NDArray] = []
        self._length = 0
        self._path = None if folder is None else folder / f"{name}.npy"
        self._file = None
        if self._path is not None:
            self._file = self._path.open("wb")
            self._write_header()
            self._data = self._file.tell()

    def extend(self, values: NDArray) -> None:
        """Adds values at the end."""
        self._length += len(values)
        if self._file is None:
            self._parts.append(np.asarray(values, dtype=self._dtype))
        else:
            self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)

    def close(self) -> NDArray:
        """The whole array; mapped, if it is in a file."""
        if self._file is None or self._path is None:
            return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=self._dtype)
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._data:  # numpy leaves room for the length to grow
            raise RuntimeError(f"{self._path}: the header has outgrown its place")
        self._file.close()
        return _map(self._path)

    def _write_header(self) -> None:
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        npy.write_array_header_1_0(self._file, header)


class RaggedWriter:
    """One ragged column that grows."""

    def __init__(self, name: str, dtype: DTypeLike, folder: Path | None) -> None:
        self._values = ArrayWriter(name + _VALUES, dtype, folder)
        self._offsets = ArrayWriter(name + _OFFSETS, np.int64, folder)
        self._ends = array("q", [0])

    def append(self, row: NDArray) -> None:
        """Adds a row."""
        self._values.extend(row)
        self._ends.append(self._ends[-1] + len(row))

    def close(self) -> Ragged:
        """The column."""
        self._offsets.extend(np.frombuffer(self._ends, dtype=np.int64))
        return Ragged(self._values.close(), self._offsets.close())


def int_array(numbers: Iterable[int]) -> NDArray[np.int64]:
    """Integers as they come, int64, eight bytes each from the beginning."""
    return np.frombuffer(array("q", numbers), dtype=np.int64)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes its name when the block ends well, and is gone if it does not.

    A folder that is there by then is replaced: what it is named after says that it holds the same.
    """
    aside = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
    aside.mkdir(parents=True)
    for left in folder.parent.glob("*.tmp-*"):  # by a process that was killed
        with suppress(FileNotFoundError):  # another one is just being finished
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            fsync_path(path)
        try:
            aside.rename(folder)
        except OSError:
            old = aside.with_name(f"{aside.name}-old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
