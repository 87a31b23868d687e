"""PPO: online RL in which a critic says what each token was worth, not the comparison within a group.

The loop is `online`'s. What differs is who assigns credit, and that the trainer is two worlds of ranks
(`actor_critic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.advantages import AdvantageResult, group_advantages
from raytune_rl.algorithms.ppo import missing_eos
from raytune_rl.config import PPOConfig, resolved
from raytune_rl.groups.critic import ActorCritic
from raytune_rl.groups.fleet import media_places
from raytune_rl.pipelines import online
from raytune_rl.pipelines.collect import Collected
from raytune_rl.pipelines.experience import Experience
from raytune_rl.pipelines.generation_log import GenerationLog
from raytune_rl.pipelines.lifecycle import RunResult
from raytune_rl.protocol.train import EstimateSettings
from raytune_rl.protocol.trajectory import Trajectory


def run(config: PPOConfig, notices: Sequence[str] = ()) -> RunResult:
    """Trains a policy and its critic by PPO on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        notices: Sentences that were already told to the user; kept with the plan.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    told = list(notices)
    if config.adapters and resolved.critic_start(config) is None:
        told.append("the critic starts from --model without --adapters, which are the policy's")
    return online.run(config, told, PPORun)


class CriticLog(GenerationLog):
    """What a generation tells where a critic, and not a comparison within groups, says what it was worth.

    Attributes:
        estimated: Metrics of the critic's latest estimate.
    """

    NO_SIGNAL = "no completion has a reward"
    estimated: Mapping[str, float] = MappingProxyType({})

    def has_signal(self, experience: Experience) -> bool:
        """A critic learns from any reward."""
        return bool(np.isfinite(experience.rewards).any())

    def tell(
        self, step: int, collected: Collected, compared: AdvantageResult, kl: NDArray[np.float64] | None
    ) -> Mapping[str, float]:
        """As `GenerationLog.tell`; the spread of rewards is that of all completions."""
        told = dict(super().tell(step, collected, compared, kl))
        rewards = collected.kept.rewards[np.isfinite(collected.kept.rewards)]
        told["reward_std"] = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
        for name in ("frac_reward_zero_std", "groups_without_comparison"):
            told.pop(name, None)
        return {**told, **self.estimated}


class PPORun(online.OnlineRun):
    """`OnlineRun` with a critic."""

    LOG = CriticLog
    generation_log: CriticLog
    config: PPOConfig
    policy: ActorCritic

    def late_columns(self, batch: Sequence[Trajectory]) -> dict[str, list[Any]]:
        """Log-probs of reference and policy: the price of KL needs both even where the loss needs neither."""
        late = super().late_columns(batch)
        if "old_logprobs" not in late:
            with self.run.timer.phase("train"):
                rows, lengths = [t.data for t in batch], [t.length for t in batch]
                late["old_logprobs"] = self.policy.logprobs(rows, lengths, media_places(batch)).columns
        return late

    def credit(
        self, experience: Experience, late: dict[str, list[Any]]
    ) -> tuple[AdvantageResult, NDArray[np.float64] | None]:
        """Generalised advantage estimation; the advantages travel as a column, one a token."""
        config, batch = self.config, experience.batch
        finished = np.array([t.finish_reason != "length" for t in batch])
        scores = missing_eos(experience.rewards, finished, config.missing_eos_penalty)
        with self.run.timer.phase("critic"):
            found = self.policy.critic.estimate(
                [t.data for t in batch],
                [t.length for t in batch],
                scores,
                late,
                EstimateSettings(config.kl_coef, config.gamma, config.lam),
                whiten_rewards=config.whiten_rewards,
            )
        late.pop("ref_logprobs", None)
        late |= found.columns
        self.generation_log.estimated = found.metrics
        compared = group_advantages(experience.rewards, [t.group for t in batch], "none")
        return replace(compared, advantages=found.means.astype(np.float32)), None
