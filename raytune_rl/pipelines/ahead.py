"""Sampling ahead of the training: what `--async_generate true` does in the place of `collect.Collector`.

The engines go on while the policy trains. What may be asked, and what a generation is made of, says the
buffer; who sampled it under which weights, the trajectories say themselves. On GPUs that engines and policy
take turns on nothing can go on meanwhile: there a burst samples as many generations as may be ahead, and the
engines sleep until these are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from raytune_rl.algorithms.credit.base import Credit
from raytune_rl.algorithms.experience import Experience, join
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.batching import GRPOSchedule
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.errors import RaytuneError
from raytune_rl.groups.seeds import row_seeds
from raytune_rl.groups.start import Samplers
from raytune_rl.groups.trajectory_data import TrajectoryStore
from raytune_rl.pipelines.buffer import Asked, ExperienceBuffer
from raytune_rl.pipelines.buffer_files import FOLDER, read_groups, write_groups
from raytune_rl.pipelines.collect import EVALUATION, Collected
from raytune_rl.pipelines.group_flow import Outcome, Outside, Scored
from raytune_rl.pipelines.prompt_stream import PromptStream
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.pipelines.scoring import Scoring
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.tickets import ServeReport, Ticket
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
from raytune_rl.tracking.timer import StepTimer
from raytune_rl.workers.saving import writing


class AheadCollector:
    """Keeps the engines at work and gives one generation after another.

    Args:
        config: Of the run.
        groups: Who samples and scores.
        prompts: What to sample from.
        schedule: Sizes and generations.
        state: Of the run; what becomes of prompts is counted there.
        credit: Says which groups teach anything.
        scoring: Gives rewards and counts.
        say: Tells the user a sentence.
        outside: The world.
    """

    def __init__(
        self,
        config: RLHFConfig,
        groups: Samplers,
        prompts: PromptSet,
        schedule: GRPOSchedule,
        state: RunState,
        credit: Credit,
        scoring: Scoring,
        say: Callable[[str], None],
        outside: Outside,
    ) -> None:
        self._config, self._groups, self._prompts = config, groups, prompts
        self._state, self._credit, self._scoring, self._say = state, credit, scoring, say
        self._outside = outside
        self._store = self._outside.store or TrajectoryStore(config.step_timeout)
        self._size = schedule.batch.prompts_per_generation
        plan = BatchPlan(len(prompts), self._size, config.data_seed, config.dataset_shuffle)
        self._stream = PromptStream(config, plan, state)
        self._buffer: ExperienceBuffer[Experience] = ExperienceBuffer(
            self._size, resolved.max_staleness(config), schedule.total_generations, state.generation
        )
        self._rollout = groups.rollout
        self._flow = outside.flow(groups.rollout, self._score, config.step_timeout)
        self._in_turns = groups.gpu_sharing.takes_turns
        self._bursting = not self._in_turns
        self._asked: dict[Ticket, Asked] = {}
        self._again: list[Asked] = []  # in flight when the checkpoint was made
        self._held_out: dict[Ticket, int] = {}  # row of each
        self._held_out_prompts: PromptSet | None = None
        self._evaluated: dict[Ticket, Experience] = {}
        self._replaced: list[Experience] = []
        self._progress = TrainerState(0, 0)
        self._version = self._served = -1
        self._idle_s = 0.0
        self._update = ServeReport(-1, 0, 0.0)

    # -- the loop's side
    # ---------------------------------------------------------------------------------------------

    def serve(self, version: int) -> None:
        """The engines serve new weights; what becomes of half-written answers says `--rollout_in_flight`.
        Where they sleep while the policy trains, they get them when they are next needed."""
        self._version = version
        if not self._in_turns:
            self._update = self._rollout.serve(version, in_flight=self._config.rollout_in_flight)
            self._served = version

    def ready(self) -> None:
        """The engines are awake and serve the present weights. What is in flight stays so."""
        self._wake()

    def ask_ahead(self, progress: TrainerState) -> None:
        """Asks for whatever may be asked under the present weights."""
        self._progress = progress
        self._ask()

    def collect(self, generation: int, version: int, state: TrainerState, timer: StepTimer) -> Collected:
        """The next generation; waits for those of its groups that are not there."""
        self._progress = state
        began = self._outside.clock()
        with timer.phase("generate"):
            if self._in_turns and len(self._buffer) < self._size:
                self._burst()
            self._ask()
            self._until(lambda: self._buffer.complete)
            taken = self._buffer.take(version)
        kept = join(taken)
        self._scoring.book("finished", kept)
        self._state.ahead = len(self._buffer)
        metrics = {
            **staleness(kept.batch, version),
            **half_written(self._update),
            **self._idle(self._outside.clock() - began),
            **self._resampled(generation, kept),
        }
        replaced = join(self._replaced) if self._replaced else None
        self._replaced = []
        return Collected(kept, replaced, metrics)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Sampling and scoring go on while the block runs."""
        if self._in_turns:
            yield
        else:
            with self._outside.background(self._pump):
                yield

    def held_out(self, prompts: PromptSet, version: int, state: TrainerState) -> Experience:
        """Completions of all held-out prompts by the present weights, beside those in flight."""
        self._progress = state
        self._wake()
        rows = range(len(prompts))
        seeds = row_seeds(self._config.seed, EVALUATION, rows, resolved.num_generations_eval(self._config))
        requests = [EpisodeRequest(row, row, own) for row, own in zip(rows, seeds, strict=True)]
        tickets = self._flow.ask(requests, prompts, together=True, evaluation=True)
        self._held_out, self._held_out_prompts = dict(zip(tickets, rows, strict=True)), prompts
        self._until(lambda: not self._held_out)
        groups = [self._evaluated[ticket] for ticket in tickets if ticket in self._evaluated]
        self._evaluated = {}
        if not groups:
            raise RaytuneError("no held-out prompt was answered; the notes above say why")
        return join(groups)

    def settle(self) -> None:
        """Waits until nothing is in flight."""
        self._until(lambda: self._flow.idle)

    # -- checkpoints
    # ---------------------------------------------------------------------------------------------

    def finish_scoring(self) -> None:
        """Waits for the rewards of what is sampled, which need not be sampled again then."""
        self._take_in(self._flow.finish_scoring())

    def save(self, directory: Path) -> None:
        """Writes all that was asked ahead into a checkpoint."""
        groups = {str(asked.number): group for asked, group in self._buffer.finished()}
        replaced = {f"replaced-{number}": group for number, group in enumerate(self._replaced)}
        state = {"buffer": self._buffer.state_dict(), "stream": self._stream.state_dict()}
        with writing(str(directory / FOLDER)):
            left_out = write_groups(directory / FOLDER, state, {**groups, **replaced}.items(), self._store)
        if left_out:
            self._say(
                f"Note: {directory.name}: {len(left_out)} group(s) sampled ahead are not in it, as what "
                "--multi_turn_scheduler keeps of them is no JSON; a resumed run asks for them again."
            )

    def load(self, directory: Path) -> None:
        """Takes up what a checkpoint has; one of a synchronous run has nothing."""
        if not (directory / FOLDER).exists():
            return
        saved = read_groups(directory / FOLDER, self._prompts, self._store)
        ahead = {int(name): group for name, group in saved.groups.items() if name.isdecimal()}
        self._replaced = [group for name, group in saved.groups.items() if not name.isdecimal()]
        self._stream.load_state_dict(saved.state["stream"])
        self._buffer.load_state_dict(saved.state["buffer"], ahead, self._state.generation)
        self._again = self._buffer.in_flight()

    # -- inside
    # ---------------------------------------------------------------------------------------------

    def _score(self, batch: list[Trajectory], prompts: PromptSet) -> Experience:
        return self._scoring.score(batch, prompts, self._progress)

    def _wake(self) -> None:
        if self._groups.gpu_sharing.to_rollout() or self._served != self._version:
            self._rollout.serve(self._version)
            self._served = self._version

    def _burst(self) -> None:
        """Samples as much as may be ahead, and waits for all of it."""
        self._wake()
        self._bursting = True
        self._ask()
        self.settle()
        self._bursting = False

    def _ask(self) -> None:
        if not self._bursting:
            return
        asked, self._again = self._again, []
        for _ in range(self._buffer.admit(self._version)):
            drawn = self._stream.next()
            asked.append(self._buffer.ask(drawn.row, drawn.seeds, self._version))
            self._state.prompt_counts["dispatched"] += 1
        self._state.ahead = len(self._buffer)
        if asked:
            requests = [EpisodeRequest(one.number, one.row, one.seeds) for one in asked]
            tickets = self._flow.ask(requests, self._prompts, together=not self._flow.sampling)
            self._asked |= zip(tickets, asked, strict=True)

    def _pump(self, timeout_s: float) -> int:
        """Brings everything one step on; gives how much came to its end."""
        outcomes = self._flow.pump(timeout_s)
        self._take_in(outcomes)
        return len(outcomes)

    def _take_in(self, outcomes: Sequence[Outcome]) -> None:
        before = len(self._buffer)
        for outcome in outcomes:
            if outcome.ticket in self._held_out:
                row = self._held_out.pop(outcome.ticket)
                if isinstance(outcome, Scored):
                    self._evaluated[outcome.ticket] = outcome.group
                else:
                    assert self._held_out_prompts is not None
                    self._scoring.left_out(self._held_out_prompts, row, outcome.reason)
                continue
            asked = self._asked.pop(outcome.ticket)
            if isinstance(outcome, Scored):
                self._finished(asked, outcome.group)
            else:
                self._buffer.leave_out(asked.number)
                self._scoring.lost(self._prompts, asked.row, outcome.reason)
        if len(self._buffer) < before:  # something was left out
            self._ask()

    def _finished(self, asked: Asked, group: Experience) -> None:
        self._scoring.count(group)
        most = self._config.max_resample_times * self._size
        replaces = self._config.dynamic_sample and len(self._replaced) < most
        if replaces and not self._credit.informative(group):
            self._buffer.leave_out(asked.number)
            self._replaced.append(group)
            self._scoring.book("one reward in the group", group)
        else:
            self._buffer.put(asked.number, min(t.episode.version for t in group.batch), group)

    def _until(self, over: Callable[[], bool]) -> None:
        """Brings everything on until it is over."""
        for outcome in self._flow.until(over):
            self._take_in([outcome])

    def _idle(self, waited_s: float) -> dict[str, float]:
        """Seconds of this generation in which either side had nothing to do."""
        load = self._rollout.load()
        idle, self._idle_s = load.idle_s - self._idle_s, load.idle_s
        return {"idle/trainer_s": waited_s, "idle/rollout_s": max(idle, 0.0) / max(load.members, 1)}

    def _resampled(self, generation: int, kept: Experience) -> dict[str, float]:
        if not self._config.dynamic_sample:
            return {}
        replaced, size = len(self._replaced), self._size
        dull = size - len(self._credit.informative(kept))
        if dull:
            self._scoring.tell_short(generation, size, size - dull, size + replaced)
        return {
            "epoch": self._state.prompts_drawn / len(self._prompts),
            "dynamic_sample/sampled_prompts": float(size + replaced),
            "dynamic_sample/replaced_prompts": float(replaced),
            "dynamic_sample/filled_without_signal": float(dull),
        }


def half_written(update: ServeReport) -> dict[str, float]:
    """What became of the completions that were half written when the present weights came."""
    return {f"in_flight/{what}": float(getattr(update, what)) for what in ("kept", "recomputed", "aborted")}


def staleness(batch: Sequence[Trajectory], version: int) -> dict[str, float]:
    """How many versions the oldest token of each completion is behind the weights that train on it."""
    episodes = [t.episode for t in batch]
    behind = np.array([version - one.version for one in episodes])
    several = [one.newest_version not in (None, one.version) for one in episodes]
    return {
        "staleness/mean": float(behind.mean()),
        "staleness/max": float(behind.max()),
        "staleness/of_several_versions": float(np.mean(several)),
    }
