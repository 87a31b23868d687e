"""The media of many rows as columns: each distinct file once, however many rows show it.

A row holds numbers into the table. The table holds for each file either its path or its bytes, all in one
flat array: in Ray's object store that is mapped, not copied, whoever reads a row of it. A video that is given
as its frames is one medium of several files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.mapped import ArrayWriter, RaggedWriter
from raytune_rl.data.media import MediaError, MediaFile, fetch_medium, shown
from raytune_rl.data.media_tags import MODALITIES
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import MediaCounts
from raytune_rl.protocol.media import Modality

#: Columns of the object that has the rows: the files and what they are, per row. The others are the table.
ROW_COLUMN, _ROLE = "media", "media_role"
_DATA, _IS_PATH, _DIGEST = "media_data", "media_is_path", "media_digest"

_MODALITIES = tuple(MODALITIES.values())
# What a file is to its row: a medium of a modality, the first frame of a video, or a further one.
_FRAME, _NEXT_FRAME = len(_MODALITIES), len(_MODALITIES) + 1


@dataclass(frozen=True)
class StoredFile:
    """One file as the table has it: exactly one of `data` and `path` is set."""

    digest: int
    data: bytes | memoryview | None = None
    path: str | None = None

    @classmethod
    def of(cls, file: MediaFile, *, inline: bool) -> StoredFile:
        """A file that was read; `inline` keeps the bytes of a local one instead of its path."""
        if file.path is not None and not inline:
            return cls(file.digest, path=file.path)
        return cls(file.digest, data=file.data)

    @property
    def name(self) -> str:
        """The name of it in errors."""
        return self.path or f"of {len(self.data or b'')} bytes"

    def read(self, modality: Modality) -> bytes:
        """The encoded bytes.

        Raises:
            MediaError: The file is gone, or is not the one that was tokenized: its number of tokens may
                have changed.
        """
        if self.data is not None:
            return bytes(self.data)
        assert self.path is not None
        found = fetch_medium(self.path, modality=modality)
        if found.digest != self.digest:
            raise MediaError(
                f"{modality} {shown(self.path)} has changed since the data was tokenized; start the run anew"
            )
        return found.data


@dataclass(frozen=True)
class Medium:
    """A picture, video or sound of a row.

    Attributes:
        modality: Which of these it is.
        files: One file, or the frames of a video in their order.
        as_frames: Whether it is a video given as its frames.
    """

    modality: Modality
    files: tuple[StoredFile, ...]
    as_frames: bool = False

    @classmethod
    def of(
        cls, modality: Modality, files: Sequence[MediaFile], *, inline: bool, as_frames: bool = False
    ) -> Medium:
        """A medium that was read; `inline` as of `StoredFile.of`."""
        return cls(modality, tuple(StoredFile.of(file, inline=inline) for file in files), as_frames)

    @property
    def key(self) -> str:
        """Its key in caches: the digests of its files."""
        return "-".join([*(["frames"] if self.as_frames else []), *(f"{f.digest:016x}" for f in self.files)])

    @property
    def name(self) -> str:
        """Its name in logs: the path of its (first) file, or the digest of its bytes."""
        first = self.files[0]
        return first.path or f"{first.digest:016x}"

    def read(self) -> list[bytes]:
        """The encoded bytes of its files; errors as of `StoredFile.read`."""
        return [file.read(self.modality) for file in self.files]


class MediaWriter:
    """The columns for the media of rows, row after row: in files, or in memory where there is no folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._rows_before = 0
        self._numbers: dict[int, int] = {}
        self._is_path: list[bool] = []
        self._columns: tuple[RaggedWriter, RaggedWriter, RaggedWriter] | None = None

    def append(self, row: Sequence[Medium]) -> None:
        """Adds a row."""
        if self._columns is None:
            if not row:
                self._rows_before += 1
                return
            names = ((ROW_COLUMN, np.int32), (_ROLE, np.uint8), (_DATA, np.uint8))
            rows, roles, data = (RaggedWriter(name, dtype, self._folder) for name, dtype in names)
            self._columns = rows, roles, data
            for _ in range(self._rows_before):
                rows.append(np.empty(0, dtype=np.int32))
                roles.append(np.empty(0, dtype=np.uint8))
        rows, roles, data = self._columns
        files = [file for medium in row for file in medium.files]
        for file in files:
            if self._numbers.setdefault(file.digest, len(self._is_path)) == len(self._is_path):
                data.append(_flat(file))
                self._is_path.append(file.path is not None)
        rows.append(np.array([self._numbers[file.digest] for file in files], dtype=np.int32))
        roles.append(np.array([role for medium in row for role in _roles(medium)], dtype=np.uint8))

    def close(self) -> Columns:
        """The columns; none at all when no row has a medium."""
        if self._columns is None:
            return {}
        rows, roles, data = self._columns
        is_path, digest = (
            ArrayWriter(_IS_PATH, np.bool_, self._folder),
            ArrayWriter(_DIGEST, np.uint64, self._folder),
        )
        is_path.extend(np.array(self._is_path))
        digest.extend(np.array(list(self._numbers), dtype=np.uint64))
        return {
            ROW_COLUMN: rows.close(),
            _ROLE: roles.close(),
            _DATA: data.close(),
            _IS_PATH: is_path.close(),
            _DIGEST: digest.close(),
        }


def media_paths(columns: Columns) -> list[str]:
    """The files of the table that are named by their path."""
    data = columns.get(_DATA)
    if not isinstance(data, Ragged):
        return []
    return [bytes(data[number].data).decode() for number in np.flatnonzero(np.asarray(columns[_IS_PATH]))]


def media_of(columns: Columns, row: int) -> list[Medium]:
    """The media of one row, in the order of their tags; none if the object has none."""
    numbers, roles = columns.get(ROW_COLUMN), columns.get(_ROLE)
    if not isinstance(numbers, Ragged) or not isinstance(roles, Ragged):
        return []
    media: list[Medium] = []
    for number, role in zip(numbers[row].tolist(), roles[row].tolist(), strict=True):
        file = _file(columns, number)
        if role == _NEXT_FRAME:
            media[-1] = Medium("video", (*media[-1].files, file), as_frames=True)
        else:
            media.append(Medium(_modality(role), (file,), as_frames=role == _FRAME))
    return media


def count_media(columns: Columns) -> MediaCounts:
    """The columns' media in numbers. A video given as frames is told from others by its first frame."""
    numbers, roles, data = columns.get(ROW_COLUMN), columns.get(_ROLE), columns.get(_DATA)
    if not (isinstance(numbers, Ragged) and isinstance(roles, Ragged) and isinstance(data, Ragged)):
        return MediaCounts()
    row_of = np.repeat(np.arange(len(numbers)), numbers.lengths)
    shown: dict[str, int] = {}
    distinct: dict[str, int] = {}
    most: Counter[str] = Counter()
    modalities = np.where(roles.values == _FRAME, _MODALITIES.index("video"), roles.values)
    for code, modality in enumerate(_MODALITIES):
        is_modality = modalities == code
        if is_modality.any():
            shown[modality] = int(is_modality.sum())
            distinct[modality] = len(np.unique(numbers.values[is_modality]))
            most[modality] = int(np.bincount(row_of[is_modality]).max())
    stored = data.lengths[~np.asarray(columns[_IS_PATH])]
    return MediaCounts(shown, distinct, int(stored.sum()), dict(most))


def _roles(medium: Medium) -> list[int]:
    if medium.as_frames:
        return [_FRAME, *[_NEXT_FRAME] * (len(medium.files) - 1)]
    return [_MODALITIES.index(medium.modality)]


def _modality(role: int) -> Modality:
    return "video" if role == _FRAME else _MODALITIES[role]


def _flat(file: StoredFile) -> NDArray[np.uint8]:
    raw = file.data if file.path is None else file.path.encode()
    assert raw is not None
    return np.frombuffer(raw, dtype=np.uint8)


def _file(columns: Columns, number: int) -> StoredFile:
    data = columns[_DATA]
    assert isinstance(data, Ragged)
    raw = data[number].data  # a view on the store's memory: a file that is cached is never copied
    digest = int(columns[_DIGEST][number])
    if columns[_IS_PATH][number]:
        return StoredFile(digest, path=bytes(raw).decode())
    return StoredFile(digest, data=raw)
