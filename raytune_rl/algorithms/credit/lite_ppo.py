"""LitePPO's normalisation: the group's mean and the spread of the whole batch.

Source: Liu et al. 2025, "Part I: Tricks or traps? A deep dive into RL for LLM reasoning" (arXiv 2508.08221),
section 4.1. The paper's recipe has the mean over all tokens beside it: --loss_type dapo. It is GRPO's credit
with --scale_rewards batch: the spread is that of the rewards, where reinforce_plus_plus takes that of the
rewards less their group's mean.
"""

from __future__ import annotations

from raytune_rl.algorithms.credit.base import CreditKind, register_credit
from raytune_rl.algorithms.credit.group import GroupRelative

LITE_PPO = register_credit(
    CreditKind(
        "lite_ppo",
        GroupRelative,
        "the reward less the group's mean, by the spread of rewards in the batch; goes with --loss_type dapo",
        "Liu et al. 2025 (Tricks or traps?)",
        {"estimator": "grpo", "scale_rewards": "batch"},
    )
)
