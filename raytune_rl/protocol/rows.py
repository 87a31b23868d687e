"""Rows by reference: how a batch reaches a worker without passing through the driver.

The driver knows of each row only where it lies (which object, which row) and a few scalars. A worker receives
those and reads the arrays from the object store by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROMPT_TOKENS = "prompt_tokens"
"""A scalar: how many of a row's first tokens are its prompt."""


@dataclass(frozen=True, slots=True)
class RowPointer:
    """Row `row` of the columns that `ref` refers to."""

    ref: Any
    row: int


ABSENT, NOWHERE = RowPointer(None, -1), -1
"""What stands in an extra column for a row that has no values there; and its object's number in a message."""


@dataclass(frozen=True)
class Prefixes:
    """Which rows begin with the same tokens.

    Attributes:
        groups: A number for each row, int64 `[n]`; rows of one number begin alike.
        lengths: Leading tokens of each row of which that is said, int64 `[n]`.
    """

    groups: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)

    def part(self, rows: NDArray[np.int64]) -> Prefixes:
        """Those of some rows."""
        return Prefixes(self.groups[rows], self.lengths[rows])


@dataclass(frozen=True)
class RowsOf:
    """Rows of several objects, for a worker that reads them itself.

    Attributes:
        refs: The objects, each once.
        places: (index into `refs`, row) of each.
    """

    refs: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def at(cls, pointers: Sequence[RowPointer]) -> RowsOf:
        """The rows that these point to, in their order."""
        index: dict[Any, int] = {}
        places = tuple((index.setdefault(p.ref, len(index)), p.row) for p in pointers)
        return cls(tuple(index), places)

    def __len__(self) -> int:
        return len(self.places)


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
        prefixes: By which micro-batches are laid out with what rows have in common once; None: they are laid
            out row by row.
    """

    refs: tuple[Any, ...]
    places: Mapping[str, NDArray[np.int32]]
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    micro_batches: tuple[tuple[int, ...], ...] = ()
    prefixes: Prefixes | None = None

    def __len__(self) -> int:
        return len(self.places[""])


@dataclass(frozen=True)
class TrainBatch:
    """Rows of an optimizer step, or of a pass without gradients, as the controller knows them. Nothing
    changes it: its methods give new batches.

    Attributes:
        rows: Where each row lies.
        lengths: Tokens of each row, int64 `[n]`.
        columns: By name, where each row of a column lies that is not in the row's own object: what was
            computed later ("ref_logprobs", "old_logprobs", "advantages", ...) and the media of online RL.
        scalars: By name, one number a row, float64 `[n]`; "weight" and "row_weight" carry the normaliser of
            the whole step.
        prefixes: Which rows begin alike, where that is known.

    Raises:
        ValueError: A column, the lengths or a scalar has another number of rows.
    """

    rows: Sequence[RowPointer]
    lengths: NDArray[np.int64]
    columns: Mapping[str, Sequence[RowPointer]] = field(default_factory=dict)
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    prefixes: Prefixes | None = None

    def __post_init__(self) -> None:
        parts: dict[str, Sized] = {"lengths": self.lengths, **self.columns, **self.scalars}
        if self.prefixes is not None:
            parts["prefixes"] = self.prefixes
        for name, part in parts.items():
            if len(part) != len(self.rows):
                raise ValueError(f"column {name!r} has {len(part)} rows for a batch of {len(self.rows)}")

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: slice | Sequence[int]) -> TrainBatch:
        """Some of the rows, in the order given."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows
        index = np.asarray(numbers, dtype=np.int64)
        return TrainBatch(
            [self.rows[row] for row in numbers],
            self.lengths[index],
            {name: [pointers[row] for row in numbers] for name, pointers in self.columns.items()},
            {name: np.asarray(values, dtype=np.float64)[index] for name, values in self.scalars.items()},
            None if self.prefixes is None else self.prefixes.part(index),
        )

    def with_columns(self, **columns: Sequence[RowPointer]) -> TrainBatch:
        """The same rows with further columns, or others in the place of those of the same name."""
        return replace(self, columns={**self.columns, **columns})

    def with_scalars(self, **scalars: ArrayLike) -> TrainBatch:
        """The same with further numbers of each row."""
        given = {name: np.asarray(values, dtype=np.float64) for name, values in scalars.items()}
        return replace(self, scalars={**self.scalars, **given})

    def without_scalars(self) -> TrainBatch:
        """The same without numbers of rows."""
        return replace(self, scalars={})

    def keep(self, columns: Collection[str]) -> TrainBatch:
        """The same without the columns that are not named; a name that it does not have is no mistake."""
        return replace(
            self, columns={name: column for name, column in self.columns.items() if name in columns}
        )

    def drop(self, *columns: str) -> TrainBatch:
        """The same without these columns."""
        return self.keep(self.columns.keys() - set(columns))

    def message(self, micro_batches: Sequence[Sequence[int]] = (), *, shares: bool = False) -> RowBatch:
        """The message to a worker: every object is named once.

        Args:
            micro_batches: Row numbers of each.
            shares: Whether what rows have in common is computed once.
        """
        index: dict[Any, int] = {}

        def place(pointers: Sequence[RowPointer]) -> NDArray[np.int32]:
            pairs = [
                (NOWHERE if p == ABSENT else index.setdefault(p.ref, len(index)), p.row) for p in pointers
            ]
            return np.asarray(pairs, dtype=np.int32).reshape(-1, 2)

        places = {"": place(self.rows)}
        places |= {name: place(pointers) for name, pointers in self.columns.items()}
        prefixes = self.prefixes if shares else None
        return RowBatch(
            tuple(index), places, dict(self.scalars), tuple(tuple(m) for m in micro_batches), prefixes
        )
