"""CHORD: GRPO on the policy's own answers and imitation of an expert's, in one step and one loss.

Source: Zhang et al. 2025, "On-policy RL meets off-policy experts: harmonizing supervised fine-tuning and
reinforcement learning via dynamic weighting" (arXiv 2508.11408), and ms-swift's flags:

    loss = (1 - mu) GRPO + mu SFT

with mu over the steps rising to a peak (linearly) and falling to a valley (as a cosine), and, where asked
for, each token of the expert weighed by phi = p (1 - p) of its probability p (without gradient): what the
policy knows for sure, or deems impossible, teaches little. ms-swift takes the means of a local micro-batch;
here both are those of the whole optimizer step, GRPO's over completions, SFT's over the expert's tokens.
Experts' rows have no reward, no ratio and no KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.grpo import GRPOSettings, clip_in_words, clipped_by_settings
from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import EXPERT, Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CHORDSettings(GRPOSettings):
    """Hyper-parameters of CHORD.

    Attributes:
        chord_mu_peak, chord_mu_valley: the largest and the last mu.
        chord_mu_warmup_steps, chord_mu_decay_steps: steps up to the one, and from there to the other.
        chord_enable_phi_function: weigh the expert's tokens by p (1 - p).
    """

    chord_mu_peak: float = option(0.5, "Largest share of the expert's answers in the loss.", ge=0, le=1)
    chord_mu_valley: float = option(0.05, "Their share in the end.", ge=0, le=1)
    chord_mu_warmup_steps: int = option(0, "Steps in which their share rises from 0 to its peak.", ge=0)
    chord_mu_decay_steps: int = option(200, "Steps in which it then falls, as a cosine.", ge=0)
    chord_enable_phi_function: bool = option(
        False, "Weigh each token of the expert by p (1 - p) of the policy's probability of it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chord_mu_peak", "chord_mu_valley"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} is {share}; it is a share, so it must be from 0 to 1")


def mu(settings: CHORDSettings, step: int) -> float:
    """The share of the expert's answers at an optimizer step, from 0."""
    peak, valley = settings.chord_mu_peak, settings.chord_mu_valley
    warm, decay = settings.chord_mu_warmup_steps, settings.chord_mu_decay_steps
    if step < warm:
        return peak * step / warm
    if step >= warm + decay:
        return valley
    return valley + (peak - valley) * (1 + math.cos(math.pi * (step - warm) / decay)) / 2


def chord_loss(inputs: LossInputs) -> LossOutput:
    """`grpo_loss` of rows whose value `EXPERT` is 0, phi * -log p of the others; mu is in the weights.

    Metrics: those of the policy loss; `chord/nll` and `chord/phi`, means over the expert's tokens.
    """
    settings: CHORDSettings = inputs.settings
    assert inputs.advantages is not None
    given = inputs.row_values.get(EXPERT)
    if given is None:
        return policy_loss(inputs, clipped_by_settings)
    expert = given[inputs.row_of] > 0
    own = ~expert
    policy = policy_loss(
        replace(
            inputs,
            logprobs=inputs.logprobs[own],
            row_of=inputs.row_of[own],
            columns={name: column[own] for name, column in inputs.columns.items()},
            advantages=inputs.advantages[own],
            entropy=None if inputs.entropy is None else inputs.entropy[own],
        ),
        clipped_by_settings,
    )
    assert policy.token_loss is not None
    nll = -inputs.logprobs[expert]
    probability = (-nll.detach()).exp()
    phi = probability * (1 - probability) if settings.chord_enable_phi_function else torch.ones_like(nll)
    token_loss = torch.zeros_like(inputs.logprobs, dtype=policy.token_loss.dtype)
    token_loss = token_loss.masked_scatter(own, policy.token_loss)
    token_loss = token_loss.masked_scatter(expert, (phi * nll).to(token_loss.dtype))
    stats: dict[str, Stat] = {"chord/nll": mean_of(nll.detach()), "chord/phi": mean_of(phi)}
    return LossOutput(token_loss, policy.metrics.merge(MetricSums(stats)))


def _in_words(settings: CHORDSettings) -> str:
    weighed = ", weighed by p (1 - p)" if settings.chord_enable_phi_function else ""
    return (
        f"{clip_in_words(settings)}; mu up to {settings.chord_mu_peak:g} in {settings.chord_mu_warmup_steps} "
        f"steps, to {settings.chord_mu_valley:g} in {settings.chord_mu_decay_steps}{weighed}"
    )


CHORD = register_loss(
    Loss(
        "chord",
        CHORDSettings,
        chord_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="rows",
        expert_share=mu,
        summary="is grpo's, and the likelihood of an expert's answers (--chord_sft_dataset) beside it",
        paper="Zhang et al. 2025 (CHORD)",
        in_words=_in_words,
    )
)
