"""The pictures of many rows as columns: each distinct one once, however many rows show it.

A row holds numbers into the table. The table holds for each picture either the path of its file or the file's
bytes, all in one flat array: in Ray's object store that is mapped, not copied, whoever reads a row of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.mapped import ArrayWriter, RaggedWriter
from raytune_rl.data.media import MediaError, MediaFile, fetch_medium, shown
from raytune_rl.data.ragged import Columns, Ragged

#: Columns of the object that has the rows: `images` is per row, the others are the table.
ROW_COLUMN = "images"
_DATA, _IS_PATH, _DIGEST = "image_data", "image_is_path", "image_digest"


@dataclass(frozen=True)
class Medium:
    """One picture as the table has it: exactly one of `data` and `path` is set."""

    digest: int
    data: bytes | memoryview | None = None
    path: str | None = None

    @classmethod
    def of(cls, image: MediaFile, *, inline: bool) -> Medium:
        """A picture that was read; `inline` keeps the bytes of a local file instead of its path."""
        if image.path is not None and not inline:
            return cls(image.digest, path=image.path)
        return cls(image.digest, data=image.data)

    @property
    def name(self) -> str:
        """What an error calls it."""
        return shown(bytes(self.data or b"")) if self.path is None else shown(self.path)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            MediaError: The file is gone, or is not the one that was tokenized: its number of tokens may
                have changed.
        """
        if self.data is not None:
            return bytes(self.data)
        assert self.path is not None
        found = fetch_medium(self.path)
        if found.digest != self.digest:
            raise MediaError(
                f"image {self.name} has changed since the data was tokenized; start the run anew"
            )
        return found.data


class MediaWriter:
    """The columns for rows of pictures, row after row: in files, or in memory where there is no folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._rows_before = 0
        self._numbers: dict[int, int] = {}
        self._is_path: list[bool] = []
        self._columns: tuple[RaggedWriter, RaggedWriter] | None = None

    def append(self, row: Sequence[Medium]) -> None:
        """Adds a row."""
        if self._columns is None:
            if not row:
                self._rows_before += 1
                return
            names = ((ROW_COLUMN, np.int32), (_DATA, np.uint8))
            rows, data = (RaggedWriter(name, kind, self._folder) for name, kind in names)
            self._columns = rows, data
            for _ in range(self._rows_before):
                rows.append(np.empty(0, dtype=np.int32))
        rows, data = self._columns
        for picture in row:
            if self._numbers.setdefault(picture.digest, len(self._is_path)) == len(self._is_path):
                data.append(_flat(picture))
                self._is_path.append(picture.path is not None)
        rows.append(np.array([self._numbers[picture.digest] for picture in row], dtype=np.int32))

    def close(self) -> Columns:
        """The columns; none at all when no row has a picture."""
        if self._columns is None:
            return {}
        rows, data = self._columns
        is_path, digest = (
            ArrayWriter(_IS_PATH, np.bool_, self._folder),
            ArrayWriter(_DIGEST, np.uint64, self._folder),
        )
        is_path.extend(np.array(self._is_path))
        digest.extend(np.array(list(self._numbers), dtype=np.uint64))
        return {
            ROW_COLUMN: rows.close(),
            _DATA: data.close(),
            _IS_PATH: is_path.close(),
            _DIGEST: digest.close(),
        }


def media_columns(rows: Iterable[Sequence[Medium]]) -> Columns:
    """The columns for rows of pictures, in memory."""
    writer = MediaWriter()
    for row in rows:
        writer.append(row)
    return writer.close()


def media_paths(columns: Columns) -> list[str]:
    """The files of the table that are named by their path."""
    data = columns.get(_DATA)
    if not isinstance(data, Ragged):
        return []
    return [bytes(data[number].data).decode() for number in np.flatnonzero(np.asarray(columns[_IS_PATH]))]


def media_of(columns: Columns, row: int) -> list[Medium]:
    """The pictures of one row, in the order of its tags; none if the object has no pictures."""
    numbers = columns.get(ROW_COLUMN)
    if not isinstance(numbers, Ragged):
        return []
    return [_picture(columns, int(number)) for number in numbers[row]]


def count_media(columns: Columns) -> tuple[int, int, int, int]:
    """Pictures shown by the rows, distinct ones, bytes of those that are held, not named by a path, and the
    most that one row shows."""
    numbers, data = columns.get(ROW_COLUMN), columns.get(_DATA)
    if not isinstance(numbers, Ragged) or not isinstance(data, Ragged):
        return 0, 0, 0, 0
    held = data.lengths[~np.asarray(columns[_IS_PATH])]
    return len(numbers.values), len(data), int(held.sum()), int(numbers.lengths.max())


def _flat(picture: Medium) -> NDArray[np.uint8]:
    raw = picture.data if picture.path is None else picture.path.encode()
    assert raw is not None
    return np.frombuffer(raw, dtype=np.uint8)


def _picture(columns: Columns, number: int) -> Medium:
    data = columns[_DATA]
    assert isinstance(data, Ragged)
    raw = data[number].data  # a view on the store's memory: a picture that is cached is never copied
    digest = int(columns[_DIGEST][number])
    if columns[_IS_PATH][number]:
        return Medium(digest, path=bytes(raw).decode())
    return Medium(digest, data=raw)
