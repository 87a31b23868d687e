"""REAL: rewards as labels. A group's right completions shall be told from its wrong ones.

Source: Zhai et al. 2026, "Rewards as labels: revisiting RLVR from a classification perspective" (arXiv
2602.05630): with s_i = mean over the completion of log pi - log pi_old, the loss of a group is
log(1 + sum of e^(s / tau) over the wrong) + log(1 + sum of e^(-s / tau) over the right), where the 1 is the
anchor at s = 0. As in ms-swift tau is 0.5, and groups of which all completions are of one kind are skipped;
the mean is over the others. Right is what has a positive advantage, wrong what has a negative one.

A group's loss couples its completions, and ms-swift needs a whole group in one micro-batch. Here the driver
works out the slopes of a step's groups in s before the step, under the weights at which the gradient is
taken, and each completion is given its own: the gradient is that of the formula wherever the completions lie.
A group is what of it is in the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.before_step import BeforeStep, OnlineStep, StepModels, StepValues
from raytune_rl.algorithms.lazy import np
from raytune_rl.algorithms.metrics import MetricSums, Stat
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import mean_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LOSS, SLOPE = "real_loss", "real_slope"
"""Row values: the row's share of its group's loss, and the loss's slope in the row's s; both times rows by
groups, since the step takes the mean over rows."""


@dataclass(frozen=True, kw_only=True)
class REALSettings(PolicySettings):
    """Hyper-parameters of REAL.

    Attributes:
        real_tau: temperature of the scores.
    """

    real_tau: float = option(0.5, "Temperature of a completion's score.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.real_tau <= 0:
            raise ConfigError(f"real_tau is {self.real_tau}; it divides, so it must be positive")
        by_token = {
            "--rollout_importance_sampling_mode": self.correction is not None,
            "--off_policy_sequence_mask_delta": self.off_policy_delta is not None,
            "--top_entropy_quantile": self.entropy_filter,
        }
        if given := [flag for flag, on in by_token.items() if on]:
            raise ConfigError(
                f"{', '.join(given)}: --loss_type real is a loss of whole groups and cannot leave out or "
                "weigh tokens; leave it out."
            )


def group_slopes(
    scores: NDArray[np.float64], right: NDArray[np.bool_], tau: float
) -> tuple[float, NDArray[np.float64]]:
    """A group's loss, and its derivative in each score.

    Args:
        scores: s of each completion, float64 `[g]`.
        right: bool `[g]`; the others are wrong.
        tau: temperature.
    """
    exponents = np.where(right, -scores, scores) / tau
    loss, slopes = 0.0, np.zeros(len(scores))
    for side in (right, ~right):
        largest = max(float(exponents[side].max(initial=0.0)), 0.0)
        weights = np.exp(exponents[side] - largest)
        total = weights.sum() + np.exp(-largest)
        loss += largest + float(np.log(total))
        slopes[side] = weights / total
    return loss, slopes * np.where(right, -1.0, 1.0) / tau


def _prepare(settings: REALSettings, step: OnlineStep, models: StepModels) -> StepValues:
    scores = models.log_ratios() / np.maximum(step.lengths, 1)
    labelled = (step.lengths > 0) & (step.advantages != 0)
    right = step.advantages > 0
    losses, slopes, groups = np.zeros(len(step)), np.zeros(len(step)), 0
    for group in np.unique(step.groups):
        rows = np.flatnonzero(labelled & (step.groups == group))
        if len(set(right[rows].tolist())) < 2:
            continue
        loss, slopes[rows] = group_slopes(scores[rows], right[rows], settings.real_tau)
        losses[rows] = loss / len(rows)
        groups += 1
    share = len(step) / max(groups, 1)
    return StepValues({LOSS: losses * share, SLOPE: slopes * share})


def real_loss(inputs: LossInputs) -> LossOutput:
    """Row losses whose mean over the step is that of its groups; with beta the KL as token loss, averaged
    over each completion first. Metric `real/labelled`, a share of the completions."""

    def nothing(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        return inputs.logprobs * 0.0, MetricSums()

    shared = policy_loss(inputs, nothing)
    old = inputs.columns.get("old_logprobs", inputs.logprobs.detach())
    scores = mean_rows(inputs.logprobs - old, inputs.row_of, inputs.n_rows)
    slopes = inputs.row_values[SLOPE]
    row_loss = inputs.row_values[LOSS] + slopes * (scores - scores.detach())
    used = (slopes != 0).double()
    stats = {"real/labelled": Stat("mean", used.sum(), inputs.n_rows)}
    return LossOutput(shared.token_loss, shared.metrics.merge(MetricSums(stats)), row_loss)


def _rows(settings: REALSettings) -> tuple[str, ...]:
    return (LOSS, SLOPE)


REAL = register_loss(
    Loss(
        "real",
        REALSettings,
        real_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=_rows,
        fixed={"importance_sampling_level": "token"},
        before_step=BeforeStep(_prepare, frozenset({LOSS, SLOPE})),
        summary="tells a group's right completions from its wrong ones, as a classifier would",
        paper="Zhai et al. 2026 (REAL)",
        in_words=lambda settings: f"tau {settings.real_tau:g}",
    )
)
