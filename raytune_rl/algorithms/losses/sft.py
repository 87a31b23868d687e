"""Supervised fine-tuning: negative log-likelihood of the label tokens, where asked weighted by their
probability (DFT).

Source of DFT: Wu et al. 2025, "On the generalization of SFT: a reinforcement learning perspective with reward
rectification" (arXiv 2508.05629), eq. 9. As in ms-swift and TRL the mean is over the label tokens, not over
their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss

CHANNEL = "channel:"
"""Row values that begin so say whether a row is of the channel whose name follows: 1 or 0."""


@dataclass(frozen=True)
class SFTSettings:
    """What may be set.

    Attributes:
        enable_dft_loss: weigh each token by its own probability.
    """

    enable_dft_loss: bool = False


def sft_loss(inputs: LossInputs) -> LossOutput:
    """-log pi(token), per label token; with row weights 1 / total_label_tokens the sum is the global token
    mean. With DFT -sg(pi(token)) log pi(token), where there is a gradient: it would be 0 for tokens that the
    model deems impossible too, so held-out rows are measured by their likelihood.

    Metrics: `nll`, the token mean of the negative log-likelihood (without DFT equal to the weighted sum of a
        step); `token_acc` when `correct` is given; `loss_NAME`, the token mean of the loss over the rows of
        each channel that the row values name.
    """
    settings: SFTSettings = inputs.settings
    nll = -inputs.logprobs
    token_loss = nll
    if settings.enable_dft_loss and inputs.logprobs.requires_grad:
        token_loss = inputs.logprobs.detach().exp() * nll
    stats: dict[str, Stat] = {"nll": mean_of(nll)}
    if inputs.correct is not None:
        stats["token_acc"] = mean_of(inputs.correct)
    for name, member in inputs.row_values.items():
        if name.startswith(CHANNEL):
            of_channel = member[inputs.row_of] > 0
            stats[f"loss_{name.removeprefix(CHANNEL)}"] = mean_of(token_loss[of_channel])
    return LossOutput(token_loss, MetricSums(stats))


SFT = register_loss(
    Loss(
        "sft",
        SFTSettings,
        sft_loss,
        normaliser="tokens",
        paper="maximum likelihood; Wu et al. 2025 (DFT)",
    )
)
