"""KTO: completions that are good or bad by themselves, judged against where the policy stands as a whole.

Source: Ethayarajh et al. 2024 (KTO); apo_zero_unpaired, D'Oosterlinck et al. 2024. The reference
point z0 is an estimate of KL(policy || reference) over the step. TRL and ms-swift take it over one
micro-batch of all ranks; here the driver takes it over the step (`reference_point`) and gives it to every
row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import np, torch
from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import sum_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LABEL = "label"
"""Row value: 1 for a desirable completion, 0 for an undesirable one."""
REFERENCE_POINT = "reference_point"
"""Row value: z0, the same on every row of a step."""


@dataclass(frozen=True, kw_only=True)
class KTOSettings:
    """Hyper-parameters of KTO.

    Attributes:
        beta: temperature: how quickly value saturates away from the reference point.
        desirable_weight, undesirable_weight: lambda_D and lambda_U. With n_D and n_U rows the paper wants
            lambda_D n_D / (lambda_U n_U) between 1 and 4/3.
        loss_type: "kto", or "apo_zero_unpaired", which has no reference point.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"

    def __post_init__(self) -> None:
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            raise ConfigError(f"loss_type is '{self.loss_type}'; it must be kto or apo_zero_unpaired")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")


def reference_point(log_ratios: ArrayLike) -> float:
    """z0 = max(0, mean of log pi - log pi_ref over completions that do not belong to their prompts).

    Args:
        log_ratios: float64 [n], summed over each completion of the step's mismatched rows, under the weights
            of the step. Values that are not finite are left out.

    Returns:
        Nats; 0 where there is nothing to take a mean of.
    """
    known = np.asarray(log_ratios, dtype=np.float64)
    known = known[np.isfinite(known)]
    return max(0.0, float(known.mean())) if len(known) else 0.0


def kto_loss(inputs: LossInputs) -> LossOutput:
    """Row losses lambda_D (1 - sigmoid(beta (h - z0))) or lambda_U (1 - sigmoid(beta (z0 - h))).

    h is the log ratio of the whole completion. Weights: `aggregation.single_weights`. Metrics:
    `rewards/chosen` and `rewards/rejected` over desirable and undesirable rows, `logps/chosen`,
    `logps/rejected`, and `kl`, z0.
    """
    settings: KTOSettings = inputs.settings
    row_of, n_rows = inputs.row_of, inputs.n_rows
    policy = sum_rows(inputs.logprobs, row_of, n_rows)
    ratio = policy - sum_rows(inputs.columns["ref_logprobs"], row_of, n_rows)
    desirable = inputs.row_values[LABEL] > 0.5
    zero = torch.zeros_like(policy).detach()
    point = inputs.row_values[REFERENCE_POINT] if settings.loss_type == "kto" else zero
    gain = settings.beta * (ratio - point)
    row_loss = torch.where(
        desirable,
        settings.desirable_weight * torch.sigmoid(-gain),
        settings.undesirable_weight * torch.sigmoid(gain),
    )
    rewards = settings.beta * ratio
    stats: dict[str, Stat] = {
        "rewards/chosen": mean_of(rewards[desirable]),
        "rewards/rejected": mean_of(rewards[~desirable]),
        "logps/chosen": mean_of(policy[desirable]),
        "logps/rejected": mean_of(policy[~desirable]),
    }
    if settings.loss_type == "kto":
        stats["kl"] = mean_of(point)
    return LossOutput(None, MetricSums(stats), row_loss)


def _rows(settings: KTOSettings) -> tuple[str, ...]:
    return (LABEL, REFERENCE_POINT) if settings.loss_type == "kto" else (LABEL,)


KTO = register_loss(
    Loss(
        "kto",
        KTOSettings,
        kto_loss,
        lambda settings: ("ref_logprobs",),
        required_rows=_rows,
        paper="Ethayarajh et al. 2024 (KTO)",
    )
)
