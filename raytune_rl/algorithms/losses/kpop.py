"""KPop: a token is left out where trainer and engine disagree about it by more than a binary KL, either way.

Source: Guo et al. 2026 (Ant Group, "KPop"): with p the probability of the token now, q that under the engine
that sampled, and D(p, q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)), a token stays if D(p, q) and
D(q, p) are at most the threshold, 0.1. Against IcePop's fixed band of ratios the band is wide for rare tokens
and narrow for likely ones; against DPPO's it does not ask whether the token moves on.

What stays is -sg(p / q) A log p, and every token has the square of its log ratio added, as Kimi K2.5's loss
has. The sources disagree on that: prime-rl has it with a weight of 0.001, the default here, verl has the mask
alone and takes it of the policy before the step (weight 0 comes nearest to that). A token that the engine did
not score is measured against the policy before the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.dppo import binary_divergence, sampled_logprobs
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import MAX_LOG_RATIO, clamped_exp
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KPopSettings(PolicySettings):
    """Hyper-parameters of KPop.

    Attributes:
        kpop_threshold: the divergence from which a token is left out.
        kpop_tau: weight of the squared log ratio to the engine.
    """

    kpop_threshold: float = option(
        0.1, "Binary KL between trainer and engine, either way, from which a token is left out.", gt=0
    )
    kpop_tau: float = option(1e-3, "Weight of a token's squared log ratio to the engine; 0: none.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction is not None:
            raise ConfigError(
                "--rollout_importance_sampling_mode: kpop weighs tokens by their ratio to the engine "
                "already; leave it out."
            )


def kpop_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with KPop's mask; metrics `kpop/masked` and `kpop/divergence` (the larger of both ways),
    over tokens.
    """
    settings: KPopSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        logprobs, sampled = inputs.logprobs, sampled_logprobs(inputs)
        divergence = torch.maximum(
            binary_divergence(logprobs, sampled, "kl"), binary_divergence(sampled, logprobs, "kl")
        )
        masked = divergence > settings.kpop_threshold
        moved = logprobs - sampled
        weight = clamped_exp(moved.detach())
        loss = torch.where(masked, 0.0, -weight * inputs.advantages * logprobs)
        loss = loss + settings.kpop_tau * moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()
        stats = {"kpop/masked": mean_of(masked), "kpop/divergence": mean_of(divergence)}
        return loss, MetricSums(stats)

    return policy_loss(inputs, surrogate)


KPOP = register_loss(
    Loss(
        "kpop",
        KPopSettings,
        kpop_loss,
        lambda settings: (*policy_columns(settings), "rollout_logprobs"),
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        fixed={"importance_sampling_level": "token"},
        summary="leaves out tokens about which trainer and engine disagree, by a binary KL either way",
        paper="Guo et al. 2026 (KPop)",
        in_words=lambda settings: f"binary KL up to {settings.kpop_threshold:g} either way",
    )
)
