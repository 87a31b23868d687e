"""Rows by reference: how a batch reaches a worker without passing through the driver.

The driver knows of each row only where it lies (which object, which row) and a few scalars. A worker receives
those and reads the arrays from the object store by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class RowPointer:
    """Row `row` of the columns that `ref` refers to."""

    ref: Any
    row: int


@dataclass(frozen=True)
class RowBatch:
    """The rows one worker is to read.

    Attributes:
        refs: Distinct objects, each `Columns`.
        places: Column name -> int32 `[n, 2]`, (index into `refs`, row). The name "" stands for the row's own
            object (tokens and masks); other names are columns that were computed later, such as
            "ref_logprobs".
        scalars: Name -> float64 `[n]`, one value a row, such as "weight" and "advantage".
        micro_batches: Row numbers of each micro-batch; an empty one is run for the collectives' sake.
    """

    refs: tuple[Any, ...]
    places: Mapping[str, NDArray[np.int32]]
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    micro_batches: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.places[""])


def make_batch(
    rows: Sequence[RowPointer],
    late: Mapping[str, Sequence[RowPointer]] | None = None,
    scalars: Mapping[str, ArrayLike] | None = None,
    micro_batches: Sequence[Sequence[int]] = (),
) -> RowBatch:
    """Collects pointers into one message in which every object is named once."""
    index: dict[Any, int] = {}

    def place(pointers: Sequence[RowPointer]) -> NDArray[np.int32]:
        pairs = [(index.setdefault(p.ref, len(index)), p.row) for p in pointers]
        return np.asarray(pairs, dtype=np.int32).reshape(-1, 2)

    places = {"": place(rows)}
    for name, pointers in (late or {}).items():
        if len(pointers) != len(rows):
            raise ValueError(f"column {name!r} has {len(pointers)} rows for a batch of {len(rows)}")
        places[name] = place(pointers)
    return RowBatch(
        tuple(index),
        places,
        {name: np.asarray(values, dtype=np.float64) for name, values in (scalars or {}).items()},
        tuple(tuple(m) for m in micro_batches),
    )
