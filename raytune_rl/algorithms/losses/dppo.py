"""DPPO: a token stops learning when its probability, not its ratio, has moved too far.

Source: Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning" (arXiv 2602.04879), the
binary approximations of total variation and KL: with mu the probability under the engine that sampled and pi
the present one, a token is left out if it moves away (A > 0 and pi > mu, or A <= 0 and pi < mu) and D is over
the threshold, D = |pi - mu| (dppo_tv) or mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)) (dppo_kl). What
stays is -sg(min(pi / mu, cap)) A log pi, as in verl, slime and TRL.

The sources disagree on the constants. verl reads its clip range (0.2) and a cap of 20; TRL's is 10. The
thresholds here, 0.15 and 0.05, are those of published runs with the paper's masks; both are flags. A token
that the engine did not score is measured against the policy before the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import bounded, clamped_exp
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = {"tv": 0.15, "kl": 0.05}
"""Of each divergence, where the user does not say."""

# A probability of 1 leaves nothing to the other tokens, and their logarithm would be infinite.
_LEAST_REST = 1e-8


@dataclass(frozen=True, kw_only=True)
class DPPOSettings(PolicySettings):
    """Hyper-parameters of DPPO.

    Attributes:
        dppo_threshold: the divergence from which a token is left out; None: `THRESHOLD`.
        dppo_cap: upper bound of the importance weight.
    """

    dppo_threshold: float | None = option(
        None,
        "Divergence of a token from which it is left out if it moves further. Not set: 0.15 for dppo_tv, "
        "0.05 for dppo_kl.",
        ge=0,
    )
    dppo_cap: float = option(20.0, "Upper bound of a token's importance weight.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dppo_threshold is not None and self.dppo_threshold < 0:
            raise ConfigError(f"dppo_threshold is {self.dppo_threshold}; it must not be negative")
        if self.dppo_cap <= 0:
            raise ConfigError(f"dppo_cap is {self.dppo_cap}; it must be positive")
        if self.correction is not None:
            raise ConfigError(
                "--rollout_importance_sampling_mode: dppo_tv and dppo_kl weigh tokens by their ratio to the "
                "engine already; leave it out."
            )


def sampled_logprobs(inputs: LossInputs) -> Tensor:
    """Log-probs under the engine that sampled; of a token that it did not score under the policy before the
    step.
    """
    old = inputs.columns.get("old_logprobs", inputs.logprobs.detach())
    engine = inputs.columns["rollout_logprobs"].to(old.dtype)
    return bounded(torch.where(torch.isfinite(engine), engine, old))


def binary_divergence(logprobs: Tensor, sampled_logprobs: Tensor, kind: str) -> Tensor:
    """Divergence of the two-way split "this token or another", float64 [N], without gradient.

    Args:
        logprobs: float [N], now.
        sampled_logprobs: float [N], of whoever sampled.
        kind: "tv" or "kl".
    """
    log_now, log_then = (x.detach().double().clamp(max=0.0) for x in (logprobs, sampled_logprobs))
    now, then = log_now.exp(), log_then.exp()
    if kind == "tv":
        return (now - then).abs()
    rest_now, rest_then = (-(log.expm1()) for log in (log_now, log_then))
    ratio = rest_then.clamp(min=_LEAST_REST).log() - rest_now.clamp(min=_LEAST_REST).log()
    return then * (log_then - log_now) + rest_then * ratio


def dppo_loss(kind: str, inputs: LossInputs) -> LossOutput:
    """`policy_loss` with DPPO's mask; metrics `dppo/masked`, `dppo/capped` and `dppo/divergence`, over
    tokens.
    """
    settings: DPPOSettings = inputs.settings
    threshold = THRESHOLD[kind] if settings.dppo_threshold is None else settings.dppo_threshold

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        logprobs, advantages = inputs.logprobs, inputs.advantages
        sampled = sampled_logprobs(inputs)
        divergence = binary_divergence(logprobs, sampled, kind)
        moved = logprobs.detach() - sampled
        away = torch.where(advantages > 0, moved > 0, moved < 0)
        masked = away & (divergence > threshold)
        weight = clamped_exp(moved)
        capped = weight.clamp(max=settings.dppo_cap)
        loss = torch.where(masked, 0.0, -capped * advantages * logprobs)
        stats = {
            "dppo/masked": mean_of(masked),
            "dppo/capped": mean_of(weight > settings.dppo_cap),
            "dppo/divergence": mean_of(divergence),
        }
        return loss, MetricSums(stats)

    return policy_loss(inputs, surrogate)


def dppo_tv_loss(inputs: LossInputs) -> LossOutput:
    """`dppo_loss` by total variation."""
    return dppo_loss("tv", inputs)


def dppo_kl_loss(inputs: LossInputs) -> LossOutput:
    """`dppo_loss` by the KL."""
    return dppo_loss("kl", inputs)


def _columns(settings: DPPOSettings) -> tuple[str, ...]:
    return (*policy_columns(settings), "rollout_logprobs")


def _in_words(kind: str, settings: DPPOSettings) -> str:
    threshold = THRESHOLD[kind] if settings.dppo_threshold is None else settings.dppo_threshold
    return f"divergence up to {threshold:g}, weight up to {settings.dppo_cap:g}"


DPPO_TV, DPPO_KL = (
    register_loss(
        Loss(
            f"dppo_{kind}",
            DPPOSettings,
            compute,
            _columns,
            needs_advantages=True,
            required_rows=policy_rows,
            normaliser="tokens",
            fixed={"importance_sampling_level": "token"},
            summary=f"leaves out tokens whose probability has moved too far, by {measure}",
            paper="Qi et al. 2026 (DPPO)",
            in_words=partial(_in_words, kind),
        )
    )
    for kind, compute, measure in (("tv", dppo_tv_loss, "total variation"), ("kl", dppo_kl_loss, "KL"))
)
