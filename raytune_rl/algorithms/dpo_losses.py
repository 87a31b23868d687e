"""The losses of a preference pair, by name: what DPO and its relatives do with two log ratios.

x and y are the log ratios log pi - log pi_ref of the chosen and the rejected completion, d = g(x) - g(y) with
the divergence's g (`divergence`); LS is log sigmoid. Each function takes a `Ratios` and returns float64
[n_pairs].

Sources: sigmoid, Rafailov et al. 2023 (DPO), eq. 7, with Mitchell 2023 (cDPO) label smoothing; ipo, Azar et
al. 2023; hinge, Zhao et al. 2023 (SLiC-HF); robust, Chowdhury et al. 2024; exo_pair, Ji et al. 2024 (EXO);
nca_pair, Chen et al. 2024 (NCA); bco_pair, Jung et al. 2024 (BCO); sppo_hard, Wu et al. 2024 (SPPO); apo_zero
and apo_down, D'Oosterlinck et al. 2024 (APO); aot, Melnyk et al. 2024 (AOT); discopop, Lu et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.pairs import Pair

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ratios:
    """The inputs of a pair loss; all tensors float64 [n_pairs].

    Attributes:
        log_ratio: x and y.
        reward: g(x) and g(y).
        lengths: loss tokens of either side, at least 1.
        beta: temperature.
        label_smoothing: probability that a label is wrong.
        discopop_tau: temperature of discopop's mixture.
        bco_shift: BCO's reward shift delta, one number repeated.
    """

    log_ratio: Pair
    reward: Pair
    lengths: Pair
    beta: float
    label_smoothing: float
    discopop_tau: float
    bco_shift: Tensor

    @property
    def scaled(self) -> Tensor:
        """beta * d."""
        return self.beta * self.reward.margin


def smoothed(scaled: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) LS(z) - e LS(-z): the label is wrong with probability e."""
    return -(1 - label_smoothing) * torch.nn.functional.logsigmoid(
        scaled
    ) - label_smoothing * torch.nn.functional.logsigmoid(-scaled)


def sigmoid(r: Ratios) -> Tensor:
    """-LS(beta d), smoothed."""
    return smoothed(r.scaled, r.label_smoothing)


def ipo(r: Ratios) -> Tensor:
    """(g(x) / n_w - g(y) / n_l - 1 / (2 beta))^2: per token, as its authors have it in TRL."""
    gap = r.reward.chosen / r.lengths.chosen - r.reward.rejected / r.lengths.rejected
    return (gap - 1 / (2 * r.beta)) ** 2


def hinge(r: Ratios) -> Tensor:
    """max(0, 1 - beta d)."""
    return torch.relu(1 - r.scaled)


def robust(r: Ratios) -> Tensor:
    """Unbiased under labels that are wrong with probability e < 1/2."""
    e = r.label_smoothing
    return (
        -(1 - e) * torch.nn.functional.logsigmoid(r.scaled) + e * torch.nn.functional.logsigmoid(-r.scaled)
    ) / (1 - 2 * e)


def exo_pair(r: Ratios) -> Tensor:
    """KL of the policy's preference from the smoothed label, reverse, so e must be positive."""
    z, e = r.scaled, r.label_smoothing
    won = torch.sigmoid(z) * (torch.nn.functional.logsigmoid(z) - math.log1p(-e))
    return won + torch.sigmoid(-z) * (torch.nn.functional.logsigmoid(-z) - math.log(e))


def nca_pair(r: Ratios) -> Tensor:
    """-LS(beta x) - LS(-beta x) / 2 - LS(-beta y) / 2."""
    won, lost = r.beta * r.log_ratio.chosen, r.beta * r.log_ratio.rejected
    return (
        -torch.nn.functional.logsigmoid(won)
        - 0.5 * torch.nn.functional.logsigmoid(-won)
        - 0.5 * torch.nn.functional.logsigmoid(-lost)
    )


def bco_pair(r: Ratios) -> Tensor:
    """-LS(beta x - delta) - LS(delta - beta y)."""
    won, lost = r.beta * r.log_ratio.chosen, r.beta * r.log_ratio.rejected
    return -torch.nn.functional.logsigmoid(won - r.bco_shift) - torch.nn.functional.logsigmoid(
        r.bco_shift - lost
    )


def sppo_hard(r: Ratios) -> Tensor:
    """(x - 1 / (2 beta))^2 + (y + 1 / (2 beta))^2."""
    half = 1 / (2 * r.beta)
    return (r.log_ratio.chosen - half) ** 2 + (r.log_ratio.rejected + half) ** 2


def apo_zero(r: Ratios) -> Tensor:
    """1 - sigmoid(beta x) + sigmoid(beta y): for chosen completions better than the model's own."""
    return torch.sigmoid(-r.beta * r.log_ratio.chosen) + torch.sigmoid(r.beta * r.log_ratio.rejected)


def apo_down(r: Ratios) -> Tensor:
    """sigmoid(beta x) + 1 - sigmoid(beta (x - y)): for chosen completions worse than the model's own."""
    x = r.beta * r.log_ratio.chosen
    return torch.sigmoid(x) + torch.sigmoid(-r.beta * r.log_ratio.margin)


def discopop(r: Ratios) -> Tensor:
    """A mixture of -LS(beta d) and exp(-beta d), gated by sigmoid(beta d / tau)."""
    z = r.scaled
    gate = torch.sigmoid(z / r.discopop_tau)
    return -(1 - gate) * torch.nn.functional.logsigmoid(z) + gate * (-z).clamp(max=40.0).exp()


PAIR_LOSSES: Mapping[str, Callable[[Ratios], Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""Losses that see one pair at a time."""

WITH_DIVERGENCE = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "discopop")
"""Those that compare rewards; the others are defined on log ratios, whatever the divergence."""
