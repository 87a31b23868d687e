"""From prompts to experience: sample, score, and with `--dynamic_sample` replace what teaches nothing.

Dynamic sampling (Yu et al. 2025, DAPO, section 3.2) draws prompts from one endless stream, the epochs one
after another, and how many were drawn is its whole state: a resumed run draws the same ones. Where fresh
prompts do not fill the batch either, groups without a signal fill it up, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raytune_rl.algorithms.advantages import combine_rewards
from raytune_rl.algorithms.credit.base import Credit
from raytune_rl.algorithms.experience import Experience, fill_with_signal, known_values
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.data.sampler import BatchPlan, stretch
from raytune_rl.groups.start import Samplers
from raytune_rl.pipelines.demonstrations import Demonstrations
from raytune_rl.pipelines.position import PromptDraw
from raytune_rl.pipelines.reward_notices import RewardNotices
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.tracking.timer import StepTimer

EVALUATION = 2**31
"""The batch number of evaluations, in the seeds of their completions."""


@dataclass(frozen=True)
class Collected:
    """A generation.

    Attributes:
        kept: What is trained on.
        replaced: Groups without a signal that fresh ones took the place of.
        metrics: Of dynamic sampling; empty without it.
        demonstrated: It is answers of the data, not of the policy.
    """

    kept: Experience
    replaced: Experience | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    demonstrated: bool = False


class Collector:
    """Collects one generation after another.

    Args:
        config: Of the run.
        groups: Who samples and scores.
        prompts: What to sample from.
        prompts_per_generation: Groups of a generation.
        state: Of the run; what becomes of prompts is counted there.
        credit: Says which groups teach anything.
        say: Tells the user a sentence.
        demonstrations: Answers of the data that some generations consist of; None without any.
    """

    def __init__(
        self,
        config: RLHFConfig,
        groups: Samplers,
        prompts: PromptSet,
        prompts_per_generation: int,
        state: RunState,
        credit: Credit,
        say: Callable[[str], None],
        demonstrations: Demonstrations | None = None,
    ) -> None:
        self._demonstrations = demonstrations
        self._config, self._groups, self._prompts, self._say = config, groups, prompts, say
        self._state, self._credit = state, credit
        order = BatchPlan(len(prompts), prompts_per_generation, config.data_seed, config.dataset_shuffle)
        self._order, self._draw = order, PromptDraw(order, {"generation": state.generation, **state.data})
        self._notices = RewardNotices(say)

    def _book(self, outcome: str, groups: Experience) -> None:
        """Enters what became of the prompts of these groups."""
        failed = len(groups.unscored())
        self._state.prompt_failures["no completion has a reward"] += failed
        self._state.prompt_counts[outcome] += len(groups.groups) - failed

    def collect(self, generation: int, version: int, state: TrainerState, timer: StepTimer) -> Collected:
        """Samples and scores a generation with a weight version; or takes it from the data, where due."""
        shown = self._demonstrations
        if shown is not None and shown.due(generation):
            self._state.data = self._draw.state()
            return Collected(shown.of(generation, version), demonstrated=True)

        def round_of(prompts: Sequence[int], seeds: int) -> Experience:
            self._state.prompt_counts["dispatched"] += len(prompts)
            with timer.phase("generate"):
                batch = self.sample(self._prompts, prompts, self._config.num_generations, version, seeds)
            with timer.phase("reward"):
                experience = self.score(batch, self._prompts, state)
            for one in batch:
                if one.episode.failure:
                    self._state.reward_failures[
                        f"--multi_turn_scheduler: {one.episode.failure.partition(':')[0]}"
                    ] += 1
            for failure in experience.scored.failures:
                self._state.reward_failures[f"{failure.function}: {failure.kind}"] += 1
            return experience

        if self._config.dynamic_sample:
            collected = self._with_signal(generation, round_of)
        else:
            collected = Collected(round_of(self._draw.next(), generation))
            self._state.data = self._draw.state()
        self._book("finished", collected.kept)
        return collected

    def _with_signal(
        self, generation: int, round_of: Callable[[Sequence[int], int], Experience]
    ) -> Collected:
        wanted, config = self._order.batch_size, self._config
        rounds = 1 + config.max_resample_times

        def draw(count: int, number: int) -> Experience:
            prompts = stretch(
                self._order.n, self._state.prompts_drawn, count, config.data_seed, config.dataset_shuffle
            )
            self._state.prompts_drawn += count
            # Each round has seeds of its own: a prompt that comes again does not sample the same.
            return round_of(prompts.tolist(), generation * rounds + number)

        filled = fill_with_signal(wanted, rounds, draw, self._credit.informative)
        replaced = len(filled.replaced.groups)
        self._book("one reward in the group", filled.replaced)
        if filled.without_signal:
            self._tell_short(generation, wanted, wanted - filled.without_signal, wanted + replaced)
        return Collected(
            filled.kept,
            filled.replaced if replaced else None,
            {
                "epoch": self._state.prompts_drawn / len(self._prompts),
                "dynamic_sample/rounds": float(filled.rounds),
                "dynamic_sample/sampled_prompts": float(wanted + replaced),
                "dynamic_sample/replaced_prompts": float(replaced),
                "dynamic_sample/filled_without_signal": float(filled.without_signal),
            },
        )

    def _tell_short(self, generation: int, wanted: int, have: int, sampled: int) -> None:
        self._state.short_generations += 1
        if self._state.short_generations == 1:
            self._say(
                f"Note: generation {generation}: of {sampled} prompts only {have} have completions with "
                f"different rewards, {wanted} are wanted, and --max_resample_times "
                f"{self._config.max_resample_times} is used up. The rest of the batch teaches nothing. "
                "Further such generations are only counted (dynamic_sample/filled_without_signal)."
            )

    def sample(
        self, prompts: PromptSet, rows: Sequence[int], completions: int, version: int, batch: int
    ) -> list[Trajectory]:
        """Completions by a weight version; engines that slept pull it first."""
        rollout = self._groups.rollout
        if self._groups.gpu_sharing.to_rollout():
            rollout.load(version)
        evaluation = batch == EVALUATION
        return rollout.generate(prompts, rows, completions, version, batch, evaluation=evaluation)

    def score(self, batch: list[Trajectory], prompts: PromptSet, state: TrainerState) -> Experience:
        """The rewards of trajectories."""
        scored = self._groups.rewards.score(batch, prompts, state)
        self._notices.tell(scored)
        weights = resolved.reward_weights(self._config)
        return Experience(batch, scored, combine_rewards(known_values(scored, weights), weights))

    def held_out(self, prompts: PromptSet, version: int, state: TrainerState) -> Experience:
        """Completions of all held-out prompts; the same seeds each time: what changes is the policy alone."""
        count = resolved.num_generations_eval(self._config)
        batch = self.sample(prompts, range(len(prompts)), count, version, EVALUATION)
        return self.score(batch, prompts, state)
