"""CISPO: every token keeps its gradient, only its importance weight is capped.

Source: MiniMax-M1 (2025). As in ms-swift and TRL the cap is epsilon_high itself, not 1 +
epsilon_high, and there is no lower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.metrics import MetricSums, mean_of, row_means
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CISPOSettings(PolicySettings):
    """Hyper-parameters of CISPO.

    Attributes:
        epsilon_high: upper bound of the importance weight, an absolute one. It has no default: GRPO's 0.2
            would scale every gradient down to a fifth.
    """

    epsilon_high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon_high is None or self.epsilon_high <= 0:
            raise ConfigError(
                f"--loss_type cispo needs --epsilon_high, here {self.epsilon_high}: it caps a token's "
                f"weight at "
                "epsilon_high itself, not at 1 + epsilon_high, so no other loss's default fits; 5.0 is usual."
            )


def cispo_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """l = -sg(min(rho, epsilon_high)) * A * log pi, per token.

    Args:
        ratio, logprobs: float [N]; only `logprobs` carries the gradient.
        advantages: float [N].
        epsilon_high: cap of the weight.

    Returns:
        token_loss [N], and bool [N], whether the cap holds back a token with a positive advantage.
    """
    weight = ratio.detach().clamp(max=epsilon_high)
    return -weight * advantages * logprobs, (ratio.detach() > epsilon_high) & (advantages > 0)


def cispo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with CISPO's surrogate; metric `cispo_clip_ratio`, over tokens or, by row, over rows."""
    settings: CISPOSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        assert settings.epsilon_high is not None
        token_loss, capped = cispo_surrogate(
            ratio, inputs.logprobs, inputs.advantages, epsilon_high=settings.epsilon_high
        )
        by_row = settings.importance_sampling_level != "token"
        measured = row_means(capped, inputs.row_of, inputs.n_rows) if by_row else capped
        return token_loss, MetricSums({"cispo_clip_ratio": mean_of(measured)})

    return policy_loss(inputs, surrogate)


CISPO = register_loss(
    Loss(
        "cispo",
        CISPOSettings,
        cispo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        summary="caps the weight of a token instead of clipping it",
        paper="MiniMax-M1 2025",
        in_words=lambda settings: f"weight up to {settings.epsilon_high:g}",
    )
)
