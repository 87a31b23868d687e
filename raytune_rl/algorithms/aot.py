"""AOT: the policy's margins as a whole shall lie above the reference's, in the order of the quantiles.

Source: Melnyk et al. 2024, "Distributional preference alignment of LLMs via optimal transport",
paired and unpaired. Both sort a quantity over the batch and compare the k-th smallest of one side with
the k-th smallest of the other. TRL and ms-swift sort each micro-batch of each rank, so a micro-batch of one
pair is plain DPO there. Here the batch is the optimizer step. Sorting needs all values of the step before the
first gradient, so the driver takes log-probs of the step under its present weights first (a pass without
gradient, like that for old log-probs), sums them per row, and hands each row the value it is to be compared
with:

* aot: row value "aot_reference" of both rows of a pair, from `paired_partners`;
* aot_unpaired: row value "aot_partner" of each row, from `unpaired_partners`.

The loss is then a sum over rows, and its gradient is exactly that of the sorted loss of the whole step: the
order is constant where it is differentiable, and each value's partner enters as a number whose own gradient
is taken at the partner's row. Without dropout the two passes see the same weights, so the order is theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_rl.algorithms.dpo_losses import smoothed
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

REFERENCE = "aot_reference"
PARTNER = "aot_partner"


def _of_equal_rank(values: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value of `values`, the value of `theirs` that has the same rank."""
    matched = np.empty_like(values)
    matched[np.argsort(values, kind="stable")] = np.sort(theirs)
    return matched


def paired_partners(policy_margins: ArrayLike, reference_margins: ArrayLike) -> NDArray[np.float64]:
    """For each pair the reference margin of the rank that its policy margin has in the step.

    Args:
        policy_margins: float64 [n_pairs], log pi(chosen) - log pi(rejected) under the present weights.
        reference_margins: float64 [n_pairs], the same of the reference.

    Returns:
        float64 [2 * n_pairs], the row value "aot_reference".
    """
    policy, theirs = (np.asarray(m, dtype=np.float64) for m in (policy_margins, reference_margins))
    return np.repeat(_of_equal_rank(policy, theirs), 2)


def unpaired_partners(chosen: ArrayLike, rejected: ArrayLike) -> NDArray[np.float64]:
    """For each row the log ratio on the other side that has its rank.

    Args:
        chosen, rejected: float64 [n_pairs], log pi - log pi_ref under the present weights.

    Returns:
        float64 [2 * n_pairs], the row value "aot_partner", chosen rows at even places.
    """
    won, lost = (np.asarray(side, dtype=np.float64) for side in (chosen, rejected))
    partners = np.empty(2 * len(won))
    partners[0::2], partners[1::2] = _of_equal_rank(won, lost), _of_equal_rank(lost, won)
    return partners


def aot(margins: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-LS(beta (m_(k) - m_ref_(k))), smoothed, [n_pairs].

    Args:
        margins: float64 [n_pairs], of the policy, with gradient.
        reference: float64 [n_pairs], the row value "aot_reference" of the chosen rows.
        beta, label_smoothing: as in DPO.
    """
    return smoothed(beta * (margins - reference), label_smoothing)


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, partner: tuple[Tensor, Tensor], beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """-LS(beta (x_(k) - y_(k))), smoothed, as losses of chosen and of rejected rows.

    Either row of a couple of equal rank holds half of its value and the whole gradient of its own log ratio.

    Args:
        chosen, rejected: float64 [n_pairs], log ratios with gradient.
        partner: the row value "aot_partner" of chosen and of rejected rows.
        beta, label_smoothing: as in DPO.
    """
    won = smoothed(beta * (chosen - partner[0]), label_smoothing)
    lost = smoothed(beta * (partner[1] - rejected), label_smoothing)
    return won - 0.5 * won.detach(), lost - 0.5 * lost.detach()
