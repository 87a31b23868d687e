"""Rows from wherever the user keeps them: a file, a folder, a hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import BadRow, Row, RowError
from raytune_rl.data.files import read_file
from raytune_rl.data.folders import data_files
from raytune_rl.data.specs import DatasetSpec, parse_spec
from raytune_rl.errors import DataError

__all__ = ["BadRow", "DatasetSpec", "Row", "drawn", "load_rows", "parse_spec", "read_rows", "sample"]

T = TypeVar("T")


def read_rows(
    spec: DatasetSpec, *, announce: Callable[[str], None] = lambda _: None
) -> Iterator[Row | BadRow]:
    """Streams all rows of a data set in their order; `#N` is not applied (see `sample`).

    Args:
        spec: What to read. A local path never touches the network.
        announce: Takes sentences the user should see (files left out, for example).

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if spec.path is None:
        from raytune_rl.data.hubs import read_hub

        yield from read_hub(spec)
        return
    files, notice = local_files(spec, spec.path)
    if notice:
        announce(notice)
    for file in files:
        yield from read_file(file)


def local_files(spec: DatasetSpec, path: Path) -> tuple[list[Path], str | None]:
    """The files of a local data set in the order in which they are read, and a sentence when some were left
    out.

    Raises:
        DataError: There are none, or a subset is not there.
    """
    if path.is_dir():
        return data_files(path, spec.subsets)
    if spec.subsets:
        raise DataError(
            f"data set {spec.text!r}: a file has no subsets; leave out ':{'/'.join(spec.subsets)}'"
        )
    return [path], None


def drawn(length: int, count: int | None, *, shuffle: bool, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """`#N` of ms-swift: which of `length` items, int64 `[N]`; or more than there are.

    Fewer than all: a random choice without repetition, in random order, or the first N without `shuffle`.
    More than all: the whole set as often as it fits, then such a choice for the rest. None: all of them.
    """
    every = np.arange(length, dtype=np.int64)
    if count is None or not length:
        return every
    repeats, rest = divmod(count, length)
    some = np.random.default_rng(seed).permutation(length) if shuffle else every
    return np.concatenate([np.tile(every, repeats), some[:rest]])


def sample(items: Sequence[T], count: int | None, *, shuffle: bool, seed: int | Sequence[int]) -> list[T]:
    """The items that `drawn` chooses."""
    return [items[i] for i in drawn(len(items), count, shuffle=shuffle, seed=seed)]


def load_rows(text: str, *, use_hf: bool = False, shuffle: bool = True, seed: int = 42) -> list[Row]:
    """All rows of one `--dataset` value, `#N` applied.

    Raises:
        RowError: A row cannot be read; it names the file, the line and the reason.
        DataError: The source as a whole cannot be read.
    """
    spec = parse_spec(text, use_hf=use_hf)
    rows: list[Row] = []
    for row in read_rows(spec):
        if isinstance(row, BadRow):
            raise RowError(row.source, row.line, row.reason)
        rows.append(row)
    return sample(rows, spec.sample, shuffle=shuffle, seed=seed)
