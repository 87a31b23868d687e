"""The policy gradient's token loss: a function of importance ratio and advantage, filters, and the KL.

`policy_loss` is what GRPO and its kin have in common; an algorithm adds its surrogate (`clipped_surrogate`
here, `cispo`, `sapo`) and one line of registration.

Source: Shao et al. 2024 (DeepSeekMath), eq. 3; asymmetric clipping from Yu et al. 2025 (DAPO), eq. 10; the
upper cap `delta` for negative advantages from INTELLECT-2 (2025), section 3.4. Semantics as in ms-swift and
TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from raytune_rl.algorithms.correction import RolloutCorrection, correction_weights, off_policy_keep
from raytune_rl.algorithms.kl import k2, k3
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import (
    MetricSums,
    Stat,
    max_of,
    mean_of,
    min_of,
    row_means,
)
from raytune_rl.algorithms.ratio import LEVELS, Level, importance_ratio
from raytune_rl.algorithms.registry import LossInputs, LossOutput
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Surrogate: TypeAlias = "Callable[[Tensor, LossInputs], tuple[Tensor, MetricSums]]"
"""(ratio [N] with gradient, inputs) -> token loss [N] and metrics."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The settings of every policy loss.

    Attributes:
        beta: weight of the KL to the reference; 0 means no reference at all.
        kl_estimator: "k3", or "k2", whose gradient is that of the true KL. k1 has none in expectation: it
            belongs into the reward.
        importance_sampling_level: see `ratio`.
        correction: of the gap to the engine, or None.
        off_policy_delta: leave out rows with a negative advantage that drifted further than this, or None.
        entropy_filter: train on tokens whose column "entropy" is at least the row value "entropy_threshold"
            (`entropy`).
    """

    beta: float = 0.04
    kl_estimator: Literal["k2", "k3"] = "k3"
    importance_sampling_level: Level = "token"
    correction: RolloutCorrection | None = None
    off_policy_delta: float | None = None
    entropy_filter: bool = False

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")
        if self.kl_estimator not in ("k2", "k3"):
            raise ConfigError(
                f"kl_estimator is '{self.kl_estimator}'; in the loss it must be k2 or k3 (the gradient of k1 "
                "is 0 in expectation)"
            )
        if self.importance_sampling_level not in LEVELS:
            raise ConfigError(
                f"importance_sampling_level is '{self.importance_sampling_level}'; it must be one of "
                f"{', '.join(LEVELS)}"
            )


def policy_loss(inputs: LossInputs, surrogate: Surrogate) -> LossOutput:
    """Ratio, surrogate, filters, KL, correction: what a policy loss does beside its own formula.

    The order is ms-swift's: the entropy filter acts on the surrogate alone; the rollout correction weighs the
    KL too, as both are expectations over what the engine sampled; a row that is left out loses both.

    Returns:
        Token loss, and the metrics of the surrogate, `kl`, `entropy/*` (over completions, as in ms-swift; of
        the filter its `threshold`), `rollout_correction/*`, `off_policy_masked` and `entropy_kept`.
    """
    settings: PolicySettings = inputs.settings
    assert inputs.advantages is not None
    logprobs, row_of, n_rows = inputs.logprobs, inputs.row_of, inputs.n_rows
    old = inputs.columns.get("old_logprobs")
    ratio = importance_ratio(logprobs, old, row_of, n_rows, settings.importance_sampling_level)
    token_loss, metrics = surrogate(ratio, inputs)
    stats: dict[str, Stat] = {}

    if settings.entropy_filter:
        threshold = inputs.row_values["entropy_threshold"]
        keep = inputs.columns["entropy"] >= threshold[row_of]
        stats["entropy/threshold"] = max_of(threshold[torch.isfinite(threshold)])
        token_loss = torch.where(keep, token_loss, 0.0)
        stats["entropy_kept"] = mean_of(keep)
    if settings.beta > 0:
        kl = (k2 if settings.kl_estimator == "k2" else k3)(logprobs, inputs.columns["ref_logprobs"])
        token_loss = token_loss + settings.beta * kl
        stats["kl"] = mean_of(kl)
    at_start = logprobs.detach() if old is None else old
    if settings.correction is not None:
        weights, measured = correction_weights(
            at_start, inputs.columns["rollout_logprobs"], row_of, n_rows, settings.correction
        )
        token_loss = token_loss * weights
        metrics = metrics.merge(measured)
    if settings.off_policy_delta is not None:
        sampled = inputs.columns.get("rollout_logprobs", at_start)
        stay, measured = off_policy_keep(
            logprobs, sampled, inputs.advantages, row_of, n_rows, settings.off_policy_delta
        )
        token_loss = torch.where(stay, token_loss, 0.0)
        metrics = metrics.merge(measured)
    if inputs.entropy is not None:
        per_row = row_means(inputs.entropy, row_of, n_rows)
        stats["entropy/mean"] = mean_of(per_row)
        stats["entropy/max"] = max_of(per_row)
        stats["entropy/min"] = min_of(per_row)
    return LossOutput(token_loss, metrics.merge(MetricSums(stats)))


def policy_columns(settings: PolicySettings) -> tuple[str, ...]:
    """Columns that a policy loss cannot do without."""
    return (
        *(("ref_logprobs",) if settings.beta > 0 else ()),
        *(("rollout_logprobs",) if settings.correction is not None else ()),
        *(("entropy",) if settings.entropy_filter else ()),
    )


def policy_rows(settings: PolicySettings) -> tuple[str, ...]:
    """Row values that a policy loss cannot do without."""
    return ("entropy_threshold",) if settings.entropy_filter else ()
