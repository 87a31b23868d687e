"""f-DPO: the log ratio seen through the divergence that ties the policy to the reference.

Source: Wang et al. 2023, "Beyond reverse KL", theorem 1 and table 1: the reward is beta * f'(pi / pi_ref) up
to a constant that cancels between the two sides of a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# Squared (ipo), e^40 still fits float32.
MAX_EXPONENT = 40.0


def divergence_reward(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(e^u) for u = log(pi / pi_ref), up to a constant. Its slope at u = 0 is 1; 1 / 2 for js_divergence.

    * reverse_kl: u, plain DPO.
    * forward_kl: 1 - e^-u.
    * js_divergence: log 2 + u - log(1 + e^u).
    * alpha_divergence: (1 - e^(-a u)) / a with a in (0, 1), as in ms-swift; it is reverse KL at a = 0 and
      forward KL at a = 1. TRL 1.x counts from the other end: its alpha is 1 - a.

    Args:
        log_ratio: float64 [n], of whole completions.
        divergence: see above.
        alpha: of the alpha-divergence.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js_divergence":
        return log_ratio - torch.nn.functional.softplus(log_ratio) + torch.log(log_ratio.new_tensor(2.0))
    power = -1.0 if divergence == "forward_kl" else -alpha
    return torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power
