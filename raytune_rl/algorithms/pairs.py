"""Preference pairs: two neighbouring rows of one micro-batch, the chosen one first.

The driver numbers the pairs of a step (`pair_numbers`) and keeps each pair together; a loss reads the two
sides with `split_pairs`, which refuses rows that are out of place. So a pair that was torn or turned around
is an error with a name and never a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PAIR = "pair"
"""Row value that numbers pairs: k + 1 on the chosen row of pair k, -(k + 1) on the rejected one."""


def pair_numbers(n_pairs: int) -> NDArray[np.float64]:
    """The row value `PAIR` of 2 * n_pairs rows, chosen rows at even places."""
    numbers = np.repeat(np.arange(1.0, n_pairs + 1), 2)
    numbers[1::2] *= -1
    return numbers


@dataclass(frozen=True)
class Pair:
    """A row quantity of both sides, [n_pairs] each."""

    chosen: Tensor
    rejected: Tensor

    def __sub__(self, other: Pair) -> Pair:
        return Pair(self.chosen - other.chosen, self.rejected - other.rejected)

    @property
    def margin(self) -> Tensor:
        """Chosen less rejected."""
        return self.chosen - self.rejected


def check_pairs(row_values: Mapping[str, Tensor], n_rows: int) -> None:
    """Checks that rows 2k and 2k + 1 are the chosen and the rejected side of one pair.

    Raises:
        ValueError: they are not. It is a defect of whoever cut the micro-batches.
    """
    pair = row_values[PAIR]
    whole = n_rows % 2 == 0 and bool(((pair[0::2] > 0) & (pair[0::2] == -pair[1::2])).all())
    if not whole:
        raise ValueError(
            f"the {n_rows} rows of this micro-batch are not pairs of a chosen row and its rejected row, but "
            f"{pair.long().tolist()[:8]}..."
        )


def split_pairs(per_row: Tensor) -> Pair:
    """The two sides of a row quantity [n_rows]."""
    return Pair(per_row[0::2], per_row[1::2])


def on_chosen(per_pair: Tensor) -> Tensor:
    """The losses of pairs as losses of rows, [2 * n_pairs]: the chosen row has it, the rejected one 0."""
    return torch.stack([per_pair, torch.zeros_like(per_pair)], dim=1).flatten()


def both_sides(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Row losses from those of either side, [2 * n_pairs]."""
    return torch.stack([chosen, rejected], dim=1).flatten()


def chosen_tokens(row_of: Tensor) -> Tensor:
    """bool [N], whether a token belongs to a chosen row."""
    return row_of % 2 == 0
