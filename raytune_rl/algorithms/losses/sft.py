"""Supervised fine-tuning: negative log-likelihood of the label tokens."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss


@dataclass(frozen=True)
class SFTSettings:
    """Plain SFT has nothing to set."""


def sft_loss(inputs: LossInputs) -> LossOutput:
    """-log pi(token), per label token; with row weights 1 / total_label_tokens the sum is the global token
    mean.

    Metrics: `nll`, the token mean of the loss (equal to the weighted sum of a step), and `token_acc` when
        `correct` is given.
    """
    token_loss = -inputs.logprobs
    stats: dict[str, Stat] = {"nll": mean_of(token_loss)}
    if inputs.correct is not None:
        stats["token_acc"] = mean_of(inputs.correct)
    return LossOutput(token_loss, MetricSums(stats))


SFT = register_loss(Loss("sft", SFTSettings, sft_loss, normaliser="tokens", paper="maximum likelihood"))
