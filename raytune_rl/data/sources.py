"""Rows from wherever the user keeps them: a file, a folder, a hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from raytune_rl.data.example import BadRow, Row, RowError
from raytune_rl.data.files import read_file
from raytune_rl.data.folders import data_files
from raytune_rl.data.specs import DatasetSpec, parse_spec
from raytune_rl.errors import DataError

__all__ = ["BadRow", "DatasetSpec", "Row", "load_rows", "parse_spec", "read_rows", "sample"]

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
    if spec.path.is_dir():
        files, notice = data_files(spec.path, spec.subsets)
        if notice:
            announce(notice)
    elif spec.subsets:
        raise DataError(
            f"data set {spec.text!r}: a file has no subsets; leave out ':{'/'.join(spec.subsets)}'"
        )
    else:
        files = [spec.path]
    for file in files:
        yield from read_file(file)


def sample(items: Sequence[T], count: int | None, *, shuffle: bool, seed: int | Sequence[int]) -> list[T]:
    """`#N` of ms-swift: N of the items, or more than there are.

    Fewer than all: a random choice without repetition, in random order, or the first N without `shuffle`.
    More than all: the whole set as often as it fits, then such a choice for the rest. None: all of them.
    """
    if count is None or not items:
        return list(items)
    repeats, rest = divmod(count, len(items))
    chosen = list(items) * repeats
    if shuffle:
        chosen += [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:rest]]
    else:
        chosen += list(items[:rest])
    return chosen


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
