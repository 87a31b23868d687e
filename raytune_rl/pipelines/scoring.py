"""Rewards of trajectories, and what became of the prompts, counted."""

from __future__ import annotations

from collections.abc import Callable

from raytune_rl.algorithms.advantages import combine_rewards
from raytune_rl.algorithms.experience import Experience, known_values
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.groups.start import Samplers
from raytune_rl.pipelines.reward_notices import RewardNotices
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.trajectory import Trajectory

NOT_ANSWERED = "no engine could answer it"
SetAside = Callable[[str, PromptSet, int, str], None]
"""Takes a prompt that was given up: see `prompt_quarantine.PromptQuarantine.add`."""


class Scoring:
    """Asks for rewards and keeps the run's account of prompts.

    Args:
        config: Of the run.
        groups: Who scores.
        state: Of the run, where all is counted.
        say: Tells the user a sentence.
        set_aside: Takes prompts that no engine survived.
    """

    def __init__(
        self,
        config: RLHFConfig,
        groups: Samplers,
        state: RunState,
        say: Callable[[str], None],
        set_aside: SetAside,
    ) -> None:
        self._config, self._groups, self._state, self._say = config, groups, state, say
        self._set_aside = set_aside
        self._notices = RewardNotices(say)

    def score(self, batch: list[Trajectory], prompts: PromptSet, state: TrainerState) -> Experience:
        """The rewards of trajectories."""
        scored = self._groups.rewards.score(batch, prompts, state)
        self._notices.tell(scored)
        weights = resolved.reward_weights(self._config)
        return Experience(batch, scored, combine_rewards(known_values(scored, weights), weights))

    def count(self, groups: Experience) -> None:
        """Counts what schedulers and rewards could not do."""
        for one in groups.batch:
            if one.episode.failure:
                kind = one.episode.failure.partition(":")[0]
                self._state.reward_failures[f"--multi_turn_scheduler: {kind}"] += 1
        for failure in groups.scored.failures:
            self._state.reward_failures[f"{failure.function}: {failure.kind}"] += 1

    def book(self, outcome: str, groups: Experience) -> None:
        """Enters what became of the prompts of these groups."""
        failed = len(groups.unscored())
        self._state.prompt_failures["no completion has a reward"] += failed
        self._state.prompt_counts[outcome] += len(groups.groups) - failed

    def lost(self, prompts: PromptSet, prompt: int, reason: str) -> None:
        """Enters a prompt that was not answered; another takes its place."""
        self._state.prompt_failures[NOT_ANSWERED] += 1
        self._set_aside("train", prompts, prompt, reason)
        self._say(f"Note: prompt {prompt} is left out, and another takes its place: {reason}")

    def left_out(self, prompts: PromptSet, prompt: int, reason: str) -> None:
        """Says that a held-out prompt was not answered."""
        self._set_aside("held out", prompts, prompt, reason)
        self._say(f"Note: a held-out prompt is left out of this evaluation: {reason}")

    def tell_short(self, generation: int, wanted: int, have: int, sampled: int) -> None:
        """Says once that a generation could not be filled with groups that teach; counts it."""
        self._state.short_generations += 1
        if self._state.short_generations == 1:
            self._say(
                f"Note: generation {generation}: of {sampled} prompts only {have} have completions with "
                f"different rewards, {wanted} are wanted, and --max_resample_times "
                f"{self._config.max_resample_times} is used up. The rest of the batch teaches nothing. "
                "Further such generations are only counted (dynamic_sample/filled_without_signal)."
            )
