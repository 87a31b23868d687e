"""Tokens to rows and back, with gradient. A row is whole inside its micro-batch, so these are exact.

Sums run in float64: a completion of thousands of tokens would lose the last digits of its log-prob in
float32, and the order in which a GPU adds would show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import row_counts

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) = 4.9e8: far beyond any clip range, and still finite in float32 when multiplied by an advantage."""

# No ratio is told from another beyond it, and a sum of such numbers is still one: inf - inf would be NaN.
_ANY_LOG_RATIO = 1e6


def sum_rows(values: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    """Sum of each row's tokens, float64 [n_rows]; 0 for a row without tokens.

    Args:
        values: float [N].
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
    """
    sums = torch.zeros(n_rows, dtype=torch.float64, device=values.device)
    return sums.index_add(0, row_of, values.double())


def mean_rows(values: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    """Mean of each row's tokens, float64 [n_rows]; 0 for a row without tokens."""
    return sum_rows(values, row_of, n_rows) / row_counts(row_of, n_rows).clamp(min=1)


def positions(row_of: Tensor, n_rows: int) -> Tensor:
    """Number of each token within its row, int64 [N], from 0; needs `row_of` ascending."""
    counts = row_counts(row_of, n_rows)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(row_of), device=row_of.device) - starts[row_of]


def discounted_to_go(values: Tensor, row_of: Tensor, n_rows: int, factor: float) -> Tensor:
    """The rest of each row, discounted: sum over k >= t of factor^(k - t) values_k; float64 [N].

    Args:
        values: float [N]; any gradient is ignored.
        row_of: int64 [N], ascending.
        n_rows: rows.
        factor: of one token's distance.
    """
    width = int(row_counts(row_of, n_rows).max()) if n_rows and len(row_of) else 0
    place = (row_of, positions(row_of, n_rows))
    table = torch.zeros(n_rows, width, dtype=torch.float64, device=values.device)
    table = table.index_put(place, values.detach().double())
    # Beyond its end a row holds 0, so a shorter row starts from 0 by itself.
    running = torch.zeros(n_rows, dtype=torch.float64, device=values.device)
    for step in range(width - 1, -1, -1):
        running = table[:, step] + factor * running
        table[:, step] = running
    return table[place]


def bounded(log_ratio: Tensor) -> Tensor:
    """A log ratio that can be summed with others: an infinite one becomes a million. NaN stays NaN."""
    return log_ratio.clamp(-_ANY_LOG_RATIO, _ANY_LOG_RATIO)


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log ratio, large but finite where the ratio is extreme; no gradient there. NaN stays NaN."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
