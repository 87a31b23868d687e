"""From prompts to experience: sample, score, and with `--dynamic_sample` replace what teaches nothing.

Dynamic sampling (Yu et al. 2025, DAPO, section 3.2) draws prompts from one endless stream, the epochs one
after another, and how many were drawn is its whole state: a resumed run draws the same ones. Where fresh
prompts do not fill the batch either, groups without a signal fill it up, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from raytune_rl.algorithms.credit.base import Credit
from raytune_rl.algorithms.experience import Experience, fill_with_signal, join
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.data.sampler import BatchPlan, stretch
from raytune_rl.errors import CheckpointError, RaytuneError
from raytune_rl.groups.seeds import row_seeds
from raytune_rl.groups.start import Samplers
from raytune_rl.pipelines.demonstrations import Demonstrations
from raytune_rl.pipelines.group_flow import Outcome, Outside, Scored
from raytune_rl.pipelines.position import PromptDraw
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.pipelines.scoring import Scoring
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
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


class Collects(Protocol):
    """Samples and scores for the loop of `online`: `Collector` one generation after another, in turn with the
    training; `ahead.AheadCollector` while the policy trains."""

    def serve(self, version: int) -> None:
        """The engines serve new weights."""

    def ready(self) -> None:
        """The engines are awake and serve the present weights."""

    def ask_ahead(self, progress: TrainerState) -> None:
        """Asks for what may be sampled before it is needed."""

    def collect(self, generation: int, version: int, state: TrainerState, timer: StepTimer) -> Collected:
        """The next generation."""
        ...

    def going_on(self) -> AbstractContextManager[None]:
        """Whatever is in flight goes on while the block runs."""
        ...

    def held_out(self, prompts: PromptSet, version: int, state: TrainerState) -> Experience:
        """Completions of all held-out prompts, with rewards."""
        ...

    def finish_scoring(self) -> None:
        """Waits for the rewards of what is sampled."""

    def save(self, directory: Path) -> None:
        """Writes what it holds into a checkpoint."""

    def load(self, directory: Path) -> None:
        """Takes up what a checkpoint has."""


class Collector:
    """Collects one generation after another.

    Args:
        config: Of the run.
        groups: Who samples and scores.
        prompts: What to sample from.
        prompts_per_generation: Groups of a generation.
        state: Of the run; what becomes of prompts is counted there.
        credit: Says which groups teach anything.
        scoring: Gives rewards and counts.
        outside: The world.
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
        scoring: Scoring,
        outside: Outside,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        self._demonstrations = demonstrations
        self._config, self._groups, self._prompts = config, groups, prompts
        self._state, self._credit, self._scoring = state, credit, scoring
        self._version, self._progress = -1, TrainerState(0, 0)
        self._flow = outside.flow(
            groups.rollout, self._score, config.step_timeout, whole=bool(config.reward_model)
        )
        order = BatchPlan(len(prompts), prompts_per_generation, config.data_seed, config.dataset_shuffle)
        self._order, self._draw = order, PromptDraw(order, {"generation": state.generation, **state.data})

    def serve(self, version: int) -> None:
        """Every engine pulls a version; on shared GPUs it is their turn then."""
        self._version = version
        self._groups.gpu_sharing.to_rollout()
        self._groups.rollout.pull(version)

    def ready(self) -> None:
        """Engines that slept pull their version again."""
        if self._groups.gpu_sharing.to_rollout():
            self._groups.rollout.pull(self._version)

    def ask_ahead(self, progress: TrainerState) -> None:
        """Nothing is."""

    def going_on(self) -> AbstractContextManager[None]:
        """Nothing is in flight while the policy trains."""
        return nullcontext()

    def finish_scoring(self) -> None:
        """A generation has its rewards."""

    def save(self, directory: Path) -> None:
        """There is nothing beside the run's state."""

    def load(self, directory: Path) -> None:
        """There must be no prompts that were asked ahead: they would be lost.

        Raises:
            CheckpointError: There are.
        """
        if self._state.ahead:
            raise CheckpointError(
                f"{directory.name} is of a run with --async_generate true and holds {self._state.ahead} "
                "prompts that were asked ahead of the training: resume with --async_generate true and "
                "--max_staleness 1 or more, or from a checkpoint of a synchronous run."
            )

    def collect(self, generation: int, version: int, state: TrainerState, timer: StepTimer) -> Collected:
        """Samples and scores a generation with a weight version; or takes it from the data, where due."""
        shown = self._demonstrations
        if shown is not None and shown.due(generation):
            self._state.data = self._draw.state()
            return Collected(shown.of(generation, version), demonstrated=True)

        self._progress = state

        def round_of(prompts: Sequence[int], seeds: int) -> Experience:
            experience = self.groups_of(prompts, seeds, version, timer)
            self._scoring.count(experience)
            return experience

        if self._config.dynamic_sample:
            collected = self._with_signal(generation, round_of)
        else:
            collected = Collected(round_of(self._draw.next(), generation))
            self._state.data = self._draw.state()
        self._scoring.book("finished", collected.kept)
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
        self._scoring.book("one reward in the group", filled.replaced)
        if filled.without_signal:
            self._scoring.tell_short(generation, wanted, wanted - filled.without_signal, wanted + replaced)
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

    def groups_of(self, rows: Sequence[int], batch: int, version: int, timer: StepTimer) -> Experience:
        """Scored completions of prompts by a weight version, in their order.

        A prompt that nobody can answer is left out, and another takes its place; which one, the seed says.
        """
        found: dict[int, Experience] = {}
        asked = dict(enumerate(rows))
        attempt = 0
        while asked:
            self._state.prompt_counts["dispatched"] += len(asked)
            seeds = row_seeds(self._config.seed, batch, list(asked.values()), self._config.num_generations)
            places = zip(asked.items(), seeds, strict=True)
            requests = [EpisodeRequest(place, int(row), own) for (place, row), own in places]
            scored, lost = self._answers(requests, self._prompts, version, timer)
            found |= scored
            for place, reason in lost.items():
                self._scoring.lost(self._prompts, asked[place], reason)
            attempt += 1
            others = np.random.default_rng([self._config.data_seed, batch, attempt])
            asked = {place: int(others.integers(self._order.n)) for place in lost}
        sampled = join([found[place] for place in sorted(found)])
        return self._with_greedy(sampled, batch, version, timer) if self._credit.wants_greedy else sampled

    def _with_greedy(self, sampled: Experience, batch: int, version: int, timer: StepTimer) -> Experience:
        """The same, with the rewards of the likeliest answers to its prompts, for a credit that asks."""
        prompt_of = {t.group: t.prompt for t in sampled.batch}
        with timer.phase("generate"):
            answers = self._groups.rollout.greedy().generate(
                self._prompts, list(prompt_of.values()), 1, version, batch
            )
        with timer.phase("reward"):
            scored = self._scoring.score(answers, self._prompts, self._progress)
        rewards = dict(zip(prompt_of, scored.rewards, strict=True))
        return replace(sampled, greedy=np.array([rewards[t.group] for t in sampled.batch]))

    def held_out(self, prompts: PromptSet, version: int, state: TrainerState) -> Experience:
        """Completions of all held-out prompts; the same seeds each time: what changes is the policy alone."""
        self._progress = state
        rows = range(len(prompts))
        seeds = row_seeds(self._config.seed, EVALUATION, rows, resolved.num_generations_eval(self._config))
        requests = [EpisodeRequest(row, row, own) for row, own in zip(rows, seeds, strict=True)]
        scored, lost = self._answers(requests, prompts, version, StepTimer(), evaluation=True)
        for row, reason in lost.items():
            self._scoring.left_out(prompts, row, reason)
        if not scored:
            raise RaytuneError("no held-out prompt was answered; the notes above say why")
        return join([scored[row] for row in sorted(scored)])

    def _answers(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        version: int,
        timer: StepTimer,
        *,
        evaluation: bool = False,
    ) -> tuple[dict[int, Experience], dict[int, str]]:
        """What became of requests, by their number: scored, or why not. Rewards are asked for as groups are
        there.
        """
        ends: list[Outcome] = []
        with timer.phase("generate"):
            self.ready()
            tickets = self._flow.ask(requests, prompts, together=True, evaluation=evaluation, version=version)
            ends += self._flow.until(lambda: not self._flow.sampling)
        with timer.phase("reward"):
            ends += self._flow.until(lambda: self._flow.idle)
        numbers = {t: request.prompt_id for t, request in zip(tickets, requests, strict=True)}
        scored = {numbers[end.ticket]: end.group for end in ends if isinstance(end, Scored)}
        lost = {numbers[end.ticket]: end.reason for end in ends if not isinstance(end, Scored)}
        return scored, lost

    def _score(self, batch: list[Trajectory], prompts: PromptSet) -> Experience:
        return self._scoring.score(batch, prompts, self._progress)
