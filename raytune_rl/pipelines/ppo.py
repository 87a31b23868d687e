"""PPO: online RL whose credit is a critic's (`algorithms.credit.gae`). The loop is `online`'s."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_rl.config import PPOConfig, resolved
from raytune_rl.pipelines import online
from raytune_rl.pipelines.lifecycle import RunResult


def run(config: PPOConfig, notices: Sequence[str] = ()) -> RunResult:
    """Trains a policy and its critic by PPO on a Ray cluster, joined or started here; see `online.run`."""
    all_notices = list(notices)
    if config.adapters and resolved.critic_start(config) is None:
        all_notices.append("the critic starts from --model without --adapters, which are the policy's")
    return online.run(config, all_notices)
