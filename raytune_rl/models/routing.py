"""The load of a mixture's experts, and the auxiliary loss that evens it out.

Source: Fedus et al. 2021 (Switch Transformer), eq. 4 to 6, as Transformers' `load_balancing_loss_func` has
it: E * sum over experts of f_e P_e, where f_e is the number of times that a router chose the expert by the
number of tokens and layers, and P_e the mean of its probability. f has no gradient. Padding does not count.

The product of two means over a batch is no sum over its parts, so Transformers' loss of a step depends on how
it is cut. Here f is counted over the whole step, all ranks, before it (`ExpertLoad`), without dropout; with f
given the loss is a sum over tokens, and the same for any cut.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raytune_rl.errors import ModelError

_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def check_balanced(model: PreTrainedModel) -> None:
    """Refuses models for which Transformers has no such loss: without experts, or with routers that choose in
    another way (DeepSeek-V3, GLM-4 MoE).

    Raises:
        ModelError: It is one of those.
    """
    if not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
        raise ModelError(
            f"--router_aux_loss_coef: Transformers has no load-balancing loss for {type(model).__name__}, "
            "which has no experts, or routers that balance themselves; leave it out"
        )


def experts_per_token(config: Any) -> int:
    """How many experts a token goes to.

    Raises:
        ModelError: The configuration does not say.
    """
    text = config.get_text_config()
    for name in _CHOICES:
        if count := getattr(text, name, None):
            return int(count)
    raise ModelError(
        f"--router_aux_loss_coef: the configuration of {text.model_type} does not say how many experts a "
        "token goes to; leave it out"
    )


def router_sums(router_logits: tuple[Tensor, ...], mask: Tensor | None, chosen: int) -> tuple[Tensor, Tensor]:
    """Probabilities and choices of each expert, summed over tokens and layers.

    Args:
        router_logits: Of each layer with experts, [tokens, E].
        mask: 1 on tokens and 0 on padding, any shape with as many elements as there are tokens; None: no
            padding.
        chosen: Experts per token.

    Returns:
        float32 [E] with gradient, and float64 [E] without.
    """
    probabilities, counts = [], []
    for logits in router_logits:
        by_token = logits.reshape(-1, logits.shape[-1]).float().softmax(-1)
        picked = torch.zeros_like(by_token).scatter_(1, by_token.topk(chosen, -1).indices, 1.0)
        if mask is not None:
            weight = mask.reshape(-1, 1).to(by_token)
            by_token, picked = by_token * weight, picked * weight
        probabilities.append(by_token.sum(0))
        counts.append(picked.double().sum(0))
    return torch.stack(probabilities).sum(0), torch.stack(counts).sum(0).detach()


@dataclass(frozen=True)
class ExpertLoad:
    """How often each expert was chosen in an optimizer step.

    Attributes:
        counts: float64 [E], over all tokens, layers and ranks.
        chosen: Experts per token.
    """

    counts: Tensor
    chosen: int

    def share(self, probabilities: Tensor) -> Tensor:
        """A micro-batch's share of the step's auxiliary loss, a scalar.

        Args:
            probabilities: As `router_sums` gives them.
        """
        rows = (self.counts.sum() / self.chosen).clamp(min=1.0)
        weights = len(self.counts) * self.counts / rows**2
        return (weights.to(probabilities) * probabilities).sum()
