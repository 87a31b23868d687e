"""LUSPO: GSPO without the division by a completion's length.

Source: Liu et al. 2026, "Length-unbiased sequence policy optimization" (arXiv 2602.05261): J = mean over
completions of |o_i| min(s_i A_i, clip(s_i) A_i), with GSPO's ratio s_i of the whole completion. GSPO's
gradient of a token is A / |o|, so long completions are pushed less; here it is A. TRL's `luspo` takes the
ratio's level from its flag and warns if it is not the sequence; here the level is part of the loss.
"""

from __future__ import annotations

from raytune_rl.algorithms.losses.grpo import GRPOSettings, clip_in_words, grpo_loss
from raytune_rl.algorithms.policy_loss import policy_columns, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss


def luspo_loss(inputs: LossInputs) -> LossOutput:
    """The clipped loss; the level of its ratio and the normaliser make the difference."""
    return grpo_loss(inputs)


LUSPO = register_loss(
    Loss(
        "luspo",
        GRPOSettings,
        luspo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="sums",
        fixed={"importance_sampling_level": "sequence"},
        summary="is gspo with completions weighted by their length",
        paper="Liu et al. 2026 (LUSPO)",
        in_words=clip_in_words,
    )
)
