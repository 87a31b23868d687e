"""Rows from wherever the user keeps them: a file, a folder, a hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import BadRow, Row
from raytune_rl.data.files import read_file
from raytune_rl.data.folders import data_files, twins
from raytune_rl.data.layout import layout_of
from raytune_rl.data.picks import Announce, Pick, Preparing, picks_of, prepared
from raytune_rl.data.rules import Identity
from raytune_rl.data.specs import DatasetSpec, parse_spec
from raytune_rl.errors import DataError

__all__ = [
    "BadRow",
    "DatasetSpec",
    "Identity",
    "Preparing",
    "Row",
    "drawn",
    "parse_spec",
    "read_rows",
    "sample",
]

T = TypeVar("T")

PLAIN = Preparing()
"""Without a word of the user's."""


def read_rows(
    spec: DatasetSpec, *, preparing: Preparing = PLAIN, announce: Announce = lambda _: None
) -> Iterator[Row | BadRow]:
    """Streams all rows of a data set in their order, prepared if it is registered; `#N` is not applied (see
    `sample`).

    Args:
        spec: What to read. A local path never touches the network.
        preparing: What the user says of the preparation.
        announce: Takes sentences the user should see (files left out, for example).

    Raises:
        DataError: The source as a whole cannot be read.
    """
    for pick, rows in _picked(spec, preparing, announce):
        yield from prepared(rows, spec, pick, preparing, announce)


def _picked(
    spec: DatasetSpec, preparing: Preparing, announce: Announce
) -> Iterator[tuple[Pick, Iterator[Row | BadRow]]]:
    if spec.path is None:
        from raytune_rl.data.hubs import read_hub

        for pick in picks_of(spec, preparing, announce):
            yield pick, read_hub(spec, pick, announce)
        return
    for pick, files in _local(spec, spec.path, preparing, announce):
        yield pick, (row for file in files for row in read_file(file))


def data_set_files(spec: DatasetSpec, preparing: Preparing = PLAIN) -> list[Path]:
    """The files on this machine that hold a data set's rows, a hub's downloaded if they were not there; empty
    where there are none.

    Raises:
        DataError: They cannot be had, or a subset or split is not there.
    """
    if spec.path is not None:
        picked = _local(spec, spec.path, preparing, lambda _: None)
        return [file for _, files in picked for file in files]
    from raytune_rl.data.hubs import hub_files

    return [file for pick in picks_of(spec, preparing, lambda _: None) for file in hub_files(spec, pick)]


def _local(
    spec: DatasetSpec, path: Path, preparing: Preparing, announce: Announce
) -> list[tuple[Pick, list[Path]]]:
    """The files of each pick, in the order in which they are read."""
    if not path.is_dir():
        for what, names in (("subsets", spec.subsets), ("splits", spec.splits)):
            if names:
                raise DataError(
                    f"data set {spec.text!r}: a file has no {what}; leave out {'/'.join(names)!r}"
                )
        return [(pick, [path]) for pick in picks_of(spec, preparing, announce, there=())]
    layout = layout_of(path)
    pick_files, all_notices = [], []
    for pick in picks_of(spec, preparing, announce, there=layout.subsets):
        files, notices = data_files(path, layout, pick)
        pick_files.append((pick, files))
        all_notices += [*notices, *twins(path, files)]
    for notice in dict.fromkeys(all_notices):
        announce(notice)
    return pick_files


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
