"""Clip-Cov and KL-Cov: hold back the few tokens that take most of the entropy away.

Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning language models"
(arXiv 2505.22617). The covariance of each token is taken under the weights that the step starts from, its
means over the whole step (`covariance`); the authors' program, in verl, takes those of a micro-batch.

* clip_cov: of the tokens whose covariance is within bounds, a share of all tokens of the step is drawn at
  random and learns nothing. The rest has the clipped loss. verl draws among the tokens only that the clip
  leaves alone; here, as in the paper, among all.
* kl_cov: the share with the largest covariance gets beside the plain -rho A a penalty on |log rho|, the
  authors' estimate of the KL to the policy that sampled. Neither has a clip.

Both choose at least one token a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.before_step import BeforeStep, OnlineStep, StepModels, StepValues
from raytune_rl.algorithms.covariance import step_means
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.grpo import GRPOSettings, clip_in_words, clipped_by_settings
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SELECTED = "cov_selected"
"""Column: 1 for the tokens that are chosen, else 0."""


@dataclass(frozen=True, kw_only=True)
class ClipCovSettings(GRPOSettings):
    """Hyper-parameters of Clip-Cov, beside those of the clipped loss.

    Attributes:
        clip_cov_ratio: share of the step's tokens that learn nothing.
        clip_cov_low, clip_cov_high: they are drawn among those with a covariance between these.
    """

    clip_cov_ratio: float = option(2e-4, "Share of a step's tokens that learn nothing.", ge=0, le=1)
    clip_cov_low: float = option(1.0, "Such a token has a covariance over this.")
    clip_cov_high: float = option(5.0, "Such a token has a covariance below this.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip_cov_low < self.clip_cov_high:
            raise ConfigError(
                f"clip_cov_low {self.clip_cov_low:g} is not below clip_cov_high {self.clip_cov_high:g}; no "
                "token lies between them"
            )


@dataclass(frozen=True, kw_only=True)
class KLCovSettings(PolicySettings):
    """Hyper-parameters of KL-Cov.

    Attributes:
        kl_cov_ratio: share of the step's tokens that are held back.
        kl_cov_coef: weight of their KL to the policy that sampled.
    """

    kl_cov_ratio: float = option(2e-4, "Share of a step's tokens that get the KL.", ge=0, le=1)
    kl_cov_coef: float = option(1.0, "Weight of that KL.", ge=0)


def chosen(share: float, tokens: int) -> int:
    """How many tokens a share of them is, at least one."""
    return max(int(share * tokens), 1)


def _prepared(
    share: float, bounds: tuple[float, float] | None, step: OnlineStep, models: StepModels
) -> StepValues:
    from raytune_rl.protocol.train import TokenOrder  # with numpy, which --help does without

    means = step_means(models.logprobs(), step.advantages, step.lengths)
    order = TokenOrder(*means, bounds, step.number, step.seed)
    return StepValues(columns={SELECTED: models.first_tokens(order, chosen(share, int(step.lengths.sum())))})


def _prepare_clip(settings: ClipCovSettings, step: OnlineStep, models: StepModels) -> StepValues:
    bounds = (settings.clip_cov_low, settings.clip_cov_high)
    return _prepared(settings.clip_cov_ratio, bounds, step, models)


def _prepare_kl(settings: KLCovSettings, step: OnlineStep, models: StepModels) -> StepValues:
    return _prepared(settings.kl_cov_ratio, None, step, models)


def clip_cov_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with the clipped surrogate, without the chosen tokens; metric `clip_cov/selected`, a
    share of the tokens."""

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        selected = inputs.columns[SELECTED] > 0
        token_loss, metrics = clipped_by_settings(ratio, inputs)
        measured = MetricSums({"clip_cov/selected": mean_of(selected)})
        return torch.where(selected, 0.0, token_loss), metrics.merge(measured)

    return policy_loss(inputs, surrogate)


def kl_cov_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with -rho A, and coef |log rho| on the chosen tokens; metrics `kl_cov/selected` and
    `kl_cov/kl`, the mean |log rho| of the chosen tokens."""
    settings: KLCovSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        selected = inputs.columns[SELECTED] > 0
        away = ratio.log().abs()
        token_loss = -ratio * inputs.advantages
        token_loss = torch.where(selected, token_loss + settings.kl_cov_coef * away, token_loss)
        stats = {"kl_cov/selected": mean_of(selected), "kl_cov/kl": mean_of(away[selected])}
        return token_loss, MetricSums(stats)

    return policy_loss(inputs, surrogate)


def _columns(settings: PolicySettings) -> tuple[str, ...]:
    return (*policy_columns(settings), SELECTED)


CLIP_COV = register_loss(
    Loss(
        "clip_cov",
        ClipCovSettings,
        clip_cov_loss,
        _columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        fixed={"importance_sampling_level": "token"},
        before_step=BeforeStep(_prepare_clip, frozenset({SELECTED})),
        summary="is dapo without a few of the tokens that cost most entropy, drawn at random",
        paper="Cui et al. 2025 (Clip-Cov)",
        in_words=clip_in_words,
    )
)
KL_COV = register_loss(
    Loss(
        "kl_cov",
        KLCovSettings,
        kl_cov_loss,
        _columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        fixed={"importance_sampling_level": "token"},
        before_step=BeforeStep(_prepare_kl, frozenset({SELECTED})),
        summary="has a KL on the few tokens that cost most entropy",
        paper="Cui et al. 2025 (KL-Cov)",
        in_words=lambda settings: f"KL of weight {settings.kl_cov_coef:g} on {settings.kl_cov_ratio:.2%}",
    )
)
