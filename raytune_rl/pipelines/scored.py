"""Rows with what the reference says of them, taken once: the reference does not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.data import TokenSet
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import RowLogprobs

ROWS_OF_A_CALL = 2048
"""Rows that one worker scores in one call: each call has a deadline."""

Score = Callable[[TrainBatch], RowLogprobs]


@dataclass(frozen=True)
class ScoredSet:
    """Rows, and what the reference says of them.

    Attributes:
        rows: The rows.
        columns: Row -> where its reference log-probs lie; of the rows that are needed.
        sums: The same summed over each row, float64 `[n]`, NaN where not needed.
    """

    rows: TokenSet
    columns: Mapping[int, RowPointer]
    sums: NDArray[np.float64]

    @classmethod
    def without_reference(cls, rows: TokenSet) -> ScoredSet:
        """For a loss that needs none."""
        return cls(rows, {}, np.full(len(rows), np.nan))

    @classmethod
    def by(
        cls,
        score: Score,
        rows: TokenSet,
        needed: Sequence[int],
        workers: int,
        say: Callable[[str], None],
    ) -> ScoredSet:
        """Takes the log-probs of the rows that are needed, a part of them at a time.

        Args:
            score: Gives log-probs of rows.
            rows: All rows.
            needed: Numbers of those to score.
            workers: How many share the work.
            say: Told now and then how far it is, where that takes more than one call.
        """
        at_a_time = ROWS_OF_A_CALL * workers
        columns: dict[int, RowPointer] = {}
        sums = np.full(len(rows), np.nan)
        for start in range(0, len(needed), at_a_time):
            part = list(needed[start : start + at_a_time])
            scored = score(rows.batch(part))
            columns |= dict(zip(part, scored.columns, strict=True))
            sums[part] = scored.sums
            if len(needed) > at_a_time:
                say(f"reference: {start + len(part):,} of {len(needed):,} rows")
        return cls(rows, columns, sums)
