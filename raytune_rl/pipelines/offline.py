"""Training on rows that are there beforehand: SFT, and the algorithms that learn from preferences.

The same house with only the policy group lit; what is learned is an `Objective`. A loss that compares the
policy with a reference gets log-probs that were taken once, before the first step: the reference does not
change. Unless the user names another, it is the very model that training starts from, so the policy itself
takes them and no second copy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.config import PreferenceConfig, SFTConfig, resolved
from raytune_rl.config.batching import SFTSchedule, sft_schedule_of
from raytune_rl.config.training import Strategy
from raytune_rl.data.example import Task
from raytune_rl.data.media_tags import MODALITIES
from raytune_rl.data.packing import PackBatches, Packs
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.errors import ConfigError
from raytune_rl.groups import specs
from raytune_rl.groups.logprobs import score_rows
from raytune_rl.groups.restarts import RecoveryRules
from raytune_rl.groups.sizes import Groups, offline_groups
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.pipelines import dry_run, memory, offline_report, run_metrics
from raytune_rl.pipelines.going_on import going_on
from raytune_rl.pipelines.lifecycle import ResumePoint, Run, RunResult, note, stage
from raytune_rl.pipelines.local_paths import made_absolute
from raytune_rl.pipelines.objective import Objective
from raytune_rl.pipelines.position import Position, goes_on
from raytune_rl.pipelines.recovery import rules_of
from raytune_rl.pipelines.rescue import Rescue
from raytune_rl.pipelines.resume_point import open_run
from raytune_rl.pipelines.scored import Score, ScoredSet
from raytune_rl.pipelines.step_values import FROM_ORDER, FROM_POLICY, Sums
from raytune_rl.prepare.sets import token_sets
from raytune_rl.prepare.stream import Stream, held_out_of
from raytune_rl.protocol.data import SHARED, TokenSet
from raytune_rl.protocol.media import Modality
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.rewards.plugins import PluginFile
from raytune_rl.runtime import gpu_memory
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.copies import Copies
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.workers.imports import TRAINING
from raytune_rl.workers.reference import ReferenceWorker
from raytune_rl.workers.trainer import TrainerWorker, trainer_env

OfflineConfig = SFTConfig | PreferenceConfig

Units = NDArray[np.int64]


def run(config: OfflineConfig, objective: Objective, notices: Sequence[str] = ()) -> RunResult:
    """Trains a model on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        objective: What it learns.
        notices: Sentences for the user, shown with the plan.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    return going_on(config, partial(_run, objective=objective, notices=notices))


def _run(config: OfflineConfig, objective: Objective, notices: Sequence[str]) -> RunResult:
    """A run from its beginning, or a checkpoint, to its end."""
    dry_run.refuse(config)
    config = made_absolute(config)
    with ExitStack() as stack:
        with stage("connecting to Ray"):
            cluster = stack.enter_context(session(config.ray_address, note, [TRAINING]))
        groups = offline_groups(config, cluster)
        specs.check_machine(config, groups.on_gpu)
        resume_point = stack.enter_context(open_run(config))
        with stage("reading and tokenizing the data") as tell:
            where = (config, objective.shape.task, resume_point.run_dir.quarantine_jsonl)
            stream = stream_of(*where, cluster.started_here, resume_point, stack)
            if stream is None:
                train, held_out = token_sets(*where, one_machine=cluster.started_here, tell=tell)
            else:
                train, held_out = stream.next(), held_out_of(*where, cluster.started_here)  # type: ignore[arg-type]
        packs = packs_of(config, train)
        units = len(train) // objective.shape.rows if packs is None else len(packs)
        schedule = sft_schedule_of(config, groups["policy"].workers, units)
        position = Position.of(resume_point.state, schedule.rows_per_step, units)
        schedule, resized = goes_on(schedule, position, units, resume_point, config.max_steps)
        all_notices = [
            *notices,
            *resume_point.notices,
            *resized,
            *train.account.notices,
            *specs.machine_notices(config, groups.on_gpu),
            *specs.media_notices(config, groups.on_gpu, train.account.takes_media),
        ]
        plan = offline_report.plan_of(
            config, objective, groups, schedule, train, held_out, resume_point, cluster, all_notices, packs
        )
        plan, no_room = memory.added(plan, config, groups, gpu_memory.of(cluster))
        started = OfflineRun(
            config, objective, groups, schedule, train, held_out, resume_point, position, packs, stream
        )
        started.run.say(plan.render())
        if no_room is not None:
            raise no_room
        slots = stack.enter_context(reserve(groups.specs, config.start_timeout))
        with stage("starting the actors"):
            copies = Copies()
            stack.callback(copies.end)
            rules = rules_of(config, started.run.faults, cluster.object_store_bytes, 1, copies.keep)
            started.start(slots, stack, rules)
        if objective.needs_reference:
            with stage("taking log-probs under the reference"):
                started.score_by_reference(slots)
        started.restore()
        rescue = Rescue(started.run, started.policy.world)
        with started.run.watched(), rescue.ready():
            started.train(rescue)
            result = started.run.finish()
        account = train.account if stream is None or stream.account is None else stream.account
        accounts = (account, held_out.account if held_out else None)
        summary = offline_report.summary_of(config, objective, started.run, accounts, result)
        summary.show(started.run.console)
        return result


def stream_of(
    config: OfflineConfig,
    task: Task,
    quarantine: Path,
    one_machine: bool,
    resume_point: ResumePoint,
    stack: ExitStack,
) -> Stream | None:
    """The windows of `--streaming true`, from the one in which the run stopped; None without it."""
    if not (isinstance(config, SFTConfig) and config.streaming):
        return None
    first = Position.of(resume_point.state, 1, 1).epoch
    return Stream(config, task, quarantine, one_machine, first, stack)


def packs_of(config: OfflineConfig, rows: TokenSet) -> Packs | None:
    """The packs of `--packing true`, as long as the longest row may be; None without it.

    Raises:
        ConfigError: Neither the user nor the model says how long a row may be.
    """
    if not config.packs:
        return None
    capacity = config.max_length or rows.account.max_positions
    if capacity is None:
        raise ConfigError(
            "--packing true fills packs of --max_length tokens, and the model does not say what it can hold: "
            "give --max_length."
        )
    return Packs(rows.lengths, capacity, config.data_seed, config.dataset_shuffle)


class OfflineRun:
    """The policy group and the loop over the data."""

    def __init__(
        self,
        config: OfflineConfig,
        objective: Objective,
        groups: Groups,
        schedule: SFTSchedule,
        train: TokenSet,
        held_out: TokenSet | None,
        resume_point: ResumePoint,
        position: Position,
        packs: Packs | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.config = config
        self.objective = objective
        self.groups = groups
        self.schedule = schedule
        self.rows = ScoredSet.without_reference(train)
        self.held_out: ScoredSet | None = None
        if held_out is not None and resolved.eval_strategy(config) != "no":
            self.held_out = ScoredSet.without_reference(held_out)
        shown = [rows.account.media.modalities for rows in (train, held_out) if rows is not None]
        self.modalities: tuple[Modality, ...] = tuple(
            dict.fromkeys(modality for modalities in shown for modality in modalities)
        )
        if stream is not None:  # what a later window shows is not known
            self.modalities = tuple(MODALITIES.values())
        self.resume_point = resume_point
        self.run = Run(
            config, resume_point, schedule.total_steps, best_by="eval_loss", greater_is_better=False
        )
        self.order = self.order_of(train, packs)
        self.stream = stream
        self.position = position

    def order_of(self, rows: TokenSet, packs: Packs | None) -> BatchPlan | PackBatches:
        """The batches of each epoch."""
        config, size = self.config, self.schedule.rows_per_step
        if packs is not None:
            return PackBatches(packs, size)
        units = len(rows) // self.objective.shape.rows
        return BatchPlan(units, size, config.data_seed, config.dataset_shuffle, drop_last=False)

    # -- starting
    # ---------------------------------------------------------------------------------------------

    def start(self, slots: Mapping[str, Any], stack: ExitStack, rules: RecoveryRules) -> None:
        """Starts the ranks and waits for them."""
        config, groups, objective = self.config, self.groups, self.objective
        spec = specs.policy_spec(
            config,
            groups,
            self.schedule.total_steps,
            loss=objective.loss.name,
            # A plugin's class exists only where its file was loaded.
            loss_settings=vars(objective.settings) if objective.plugin_files else objective.settings,
            temperature=1.0,
            dropout=config.lora_dropout,
            takes_media=self.rows.rows.account.takes_media,
            modalities=self.modalities,
        )
        files = tuple(PluginFile.read(file) for file in objective.plugin_files)
        spec = replace(spec, plugin_files=files)
        ranks = groups["policy"].workers
        workers = WorkerGroup(
            groups["policy"],
            slots["policy"],
            TrainerWorker,
            lambda rank: {"spec": spec, "rank": rank, "world_size": ranks},
            trainer_env(groups.threads["policy"], groups.on_gpu),
            config.step_timeout,
        )
        stack.callback(workers.shutdown)
        budget = specs.max_tokens(config, groups.on_gpu)
        self.policy = PolicyGroup(TrainerWorld(workers, spec, budget, config.start_timeout, rules))
        for notice in self.policy.ready().notices:
            self.run.say(f"Note: {notice}")

    def restore(self) -> None:
        """Loads the checkpoint that the run goes on from. From here on the policy is not the reference."""
        if self.resume_point.checkpoint is not None:
            self.policy.world.load(self.resume_point.checkpoint)

    def score_by_reference(self, slots: Mapping[str, Any]) -> None:
        """Log-probs of all rows of the run under the reference: the policy, which has not moved yet, or a
        group of its own, which ends with it."""
        if "reference" not in self.groups:
            self._score(self.policy.logprobs, len(self.policy.world))
            return
        config, groups = self.config, self.groups
        assert isinstance(config, PreferenceConfig)
        spec, settings = specs.reference_spec(config, groups, self.rows.rows.account.takes_media)
        group = WorkerGroup(
            groups["reference"],
            slots["reference"],
            ReferenceWorker,
            lambda _: {"spec": spec, "settings": settings},
            trainer_env(groups.threads["reference"], groups.on_gpu),
            config.step_timeout,
        )
        budget = specs.max_tokens(config, groups.on_gpu)
        try:
            settled: list[Settled] = group.call("ping", what="starting", timeout_s=config.start_timeout)
            for notice in settled[0].notices:
                self.run.say(f"Note: reference: {notice}")
            group.replace_lost(config.start_timeout, self.run.faults.replaced)
            group.replace_hung(config.hang_timeout)
            self._score(lambda batch: score_rows(group, batch, budget, settled[0]), len(group))
        finally:
            group.shutdown()

    def _score(self, score: Score, workers: int) -> None:
        """The rows that the run will see, those of steps already done included, so that a resumed run takes
        the same numbers."""
        shape = self.objective.shape

        def needed(units: Units) -> list[int]:
            which = {*shape.trained, *(shape.scored if self.asks_policy else ())}
            return shape.rows_of(units, tuple(sorted(which))).tolist()

        upto = self.order.units
        if self.position.epoch == 0:
            upto = self.position.taken + self.schedule.rows_per_step * (self.run.total_steps - self.run.step)
        seen = np.unique(self.order.part(0, 0, upto))
        self.rows = ScoredSet.by(score, self.rows.rows, needed(seen), workers, self.run.say)
        if self.held_out is not None:
            every = self.units_of(self.held_out.rows)
            self.held_out = ScoredSet.by(score, self.held_out.rows, needed(every), workers, self.run.say)

    # -- the loop
    # ---------------------------------------------------------------------------------------------

    def train(self, rescue: Rescue) -> None:
        """One batch, one optimizer step, until the schedule ends."""
        run, config = self.run, self.config
        if run.step == 0:
            self.evaluate()
        run.timer.finish()
        ended = run.ends()
        while not ended:
            self.train_step(self.next_units())
            with run.timer.paused():
                if run.ends() or self.is_due(resolved.eval_strategy(config), resolved.eval_steps(config)):
                    self.evaluate()
                ended = run.ends()
                if ended or self.is_due(config.save_strategy, config.save_steps):
                    run.save(self.policy.world, self.position.state(self.schedule.rows_per_step))
            rescue.mark(self.position.state(self.schedule.rows_per_step))

    def is_due(self, strategy: Strategy, every: int) -> bool:
        """Whether something happens after the present step."""
        if strategy == "epoch":
            return self.position.taken >= self.order.units
        return self.run.step % every == 0

    def next_units(self) -> Units:
        """The rows of the next step. A stream's window is an epoch of its own."""
        at = self.position
        if at.taken >= self.order.units:
            at = Position(at.epoch + 1, 0)
            if self.stream is not None:
                with self.run.timer.phase("data"):
                    window = self.stream.next()
                self.rows = ScoredSet.without_reference(window)
                self.order = self.order_of(window, packs_of(self.config, window))
        stop = min(at.taken + self.schedule.rows_per_step, self.order.units)
        self.position = Position(at.epoch, stop)
        return self.order.part(at.epoch, at.taken, stop)

    def train_step(self, units: Units) -> None:
        """The loss is a mean over the whole batch, wherever its rows lie."""
        run = self.run
        with run.timer.phase("train"):
            step = self.policy.world.train(self.batch(self.rows, units), run.step)
        metrics = offline_report.with_margin(step.metrics)
        counters = run_metrics.step_metrics(run, step, self.schedule.steps_per_epoch)
        epoch = self.position.epoch + self.position.taken / self.order.units
        run.record({**metrics, **counters, "epoch": epoch})

    def evaluate(self) -> None:
        """The loss and its metrics on the held-out rows, all of them as one batch."""
        data = self.held_out
        if data is None:
            return
        measured = self.policy.world.evaluate(self.batch(data, self.units_of(data.rows))).result()
        metrics = offline_report.with_margin(measured)
        self.run.record_evaluation({f"eval_{name}": value for name, value in metrics.items()})

    def batch(self, data: ScoredSet, units: Units) -> TrainBatch:
        """A batch as the policy takes it."""
        rows = self.trained(units)
        batch = data.rows.batch(rows).with_scalars(**self.scalars(data, units))
        if not self.objective.needs_reference:
            return batch
        return batch.with_columns(ref_logprobs=[data.columns[row] for row in rows])

    def scalars(self, data: ScoredSet, units: Units) -> dict[str, NDArray[np.float64]]:
        """Scalars of each row of a batch for the loss: weights, and what it must know of the whole."""
        objective, rows = self.objective, self.trained(units)
        scalars = dict(objective.shape.weights(data.rows.loss_lengths[rows]))
        scalars |= {name: values[rows] for name, values in data.rows.values.items() if name != SHARED}
        scalars |= {name: FROM_ORDER[name](len(rows)) for name in objective.row_values if name in FROM_ORDER}
        if self.asks_policy:
            sums = self.sums(data, units)
            scalars |= {
                name: FROM_POLICY[name](sums, objective.settings, len(rows)) for name in self.asks_policy
            }
        return scalars

    def sums(self, data: ScoredSet, units: Units) -> Sums:
        """Where policy and reference stand on a batch."""
        rows = self.objective.shape.rows_of(units, self.objective.shape.scored).tolist()
        logprobs = self.policy.logprobs(data.rows.batch(rows))
        return Sums(logprobs.sums, data.sums[rows])

    @property
    def asks_policy(self) -> list[str]:
        """The row values for which the policy must be asked first."""
        return [name for name in self.objective.row_values if name in FROM_POLICY]

    def trained(self, units: Units) -> list[int]:
        """The row numbers of a batch."""
        return self.objective.shape.rows_of(units, self.objective.shape.trained).tolist()

    def units_of(self, rows: TokenSet) -> Units:
        """All units of a set."""
        return np.arange(len(rows) // self.objective.shape.rows, dtype=np.int64)
