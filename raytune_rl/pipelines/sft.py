"""Supervised fine-tuning: the same house with only the policy group lit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.sft import SFTSettings
from raytune_rl.config import SFTConfig, resolved
from raytune_rl.config.batching import SFTSchedule, sft_schedule_of
from raytune_rl.data.packing import PackBatches, Packs
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines import launch, report
from raytune_rl.pipelines.data import TokenSet, token_sets
from raytune_rl.pipelines.lifecycle import Origin, Run, RunResult, find_origin, stage
from raytune_rl.pipelines.policy_group import PolicyGroup
from raytune_rl.pipelines.resources import Groups, sft_groups
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.workers.policy import PolicyWorker, policy_env


def run(config: SFTConfig, notices: Sequence[str] = ()) -> RunResult:
    """Fine-tunes a model on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        notices: Sentences for the user, shown with the plan.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    with ExitStack() as stack:
        with stage("connecting to Ray"):
            cluster = stack.enter_context(session(config.ray_address))
        groups = sft_groups(config, cluster)
        origin = find_origin(config)
        with stage("reading and tokenizing the data"):
            train, held_out = token_sets(
                config, origin.run_dir.quarantine_jsonl, one_machine=cluster.started_here
            )
        packs = packs_of(config, train)
        units = len(train) if packs is None else len(packs)
        schedule = sft_schedule_of(config, groups["policy"].workers, units)
        told = [
            *notices,
            *origin.notices,
            *train.account.notices,
            *launch.machine_notices(config, groups.on_gpu),
            *launch.image_notices(config, groups.on_gpu, train.account.vision),
        ]
        plan = report.sft_plan(config, groups, schedule, train, held_out, origin, cluster, told, packs)
        started = SFTRun(config, groups, schedule, train, held_out, origin, packs)
        started.run.say(plan.render())
        slots = stack.enter_context(reserve(groups.specs, config.start_timeout))
        with stage("starting the actors"):
            started.start(slots, stack)
        with started.run.watched():
            started.train()
            result = started.run.finish()
        report.sft_summary(config, started.run, train.account, result).show(started.run.console)
        return result


def packs_of(config: SFTConfig, rows: TokenSet) -> Packs | None:
    """The packs of `--packing true`, as long as the longest row may be; None without it.

    Raises:
        ConfigError: Neither the user nor the model says how long a row may be.
    """
    if not config.packing:
        return None
    capacity = config.max_length or rows.account.max_positions
    if capacity is None:
        raise ConfigError(
            "--packing true fills packs of --max_length tokens, and the model does not say what it can hold: "
            "give --max_length."
        )
    return Packs(rows.lengths, capacity, config.data_seed, config.dataset_shuffle)


class SFTRun:
    """The policy group and the loop over the data."""

    def __init__(
        self,
        config: SFTConfig,
        groups: Groups,
        schedule: SFTSchedule,
        train: TokenSet,
        held_out: TokenSet | None,
        origin: Origin,
        packs: Packs | None = None,
    ) -> None:
        self.config = config
        self.groups = groups
        self.schedule = schedule
        self.rows = train
        self.held_out = held_out
        self.origin = origin
        self.run = Run(config, origin, schedule.total_steps, best_by="eval_loss", greater_is_better=False)
        size = schedule.rows_per_step
        self.order = (
            BatchPlan(len(train), size, config.data_seed, config.dataset_shuffle, drop_last=False)
            if packs is None
            else PackBatches(packs, size)
        )

    def start(self, slots: Mapping[str, Any], stack: ExitStack) -> None:
        """Starts the ranks and waits for them."""
        config, groups = self.config, self.groups
        spec = launch.policy_spec(
            config,
            groups,
            self.schedule.total_steps,
            loss="sft",
            loss_settings=SFTSettings(),
            temperature=1.0,
            dropout=config.lora_dropout,
            vision=self.rows.account.vision,
        )
        ranks = groups["policy"].workers
        workers = WorkerGroup(
            groups["policy"],
            slots["policy"],
            PolicyWorker,
            lambda rank: {"spec": spec, "rank": rank, "world_size": ranks},
            policy_env(groups.threads["policy"], groups.on_gpu),
            config.step_timeout,
        )
        stack.callback(workers.shutdown)
        self.policy = PolicyGroup(
            workers, spec, launch.max_tokens(config, groups.on_gpu), config.start_timeout
        )
        for notice in self.policy.ready().notices:
            self.run.say(f"Note: {notice}")
        if self.origin.checkpoint is not None:
            self.policy.load(self.origin.checkpoint)

    def train(self) -> None:
        """One batch, one optimizer step, until the schedule ends."""
        run, config = self.run, self.config
        if run.step == 0:
            self.evaluate()
        run.timer.finish()
        while run.step < self.schedule.total_steps and not run.stop_requested:
            self.train_step(self.order.batch(run.step).tolist())
            last = run.step >= self.schedule.total_steps or run.stop_requested
            with run.timer.paused():
                if last or run.step % resolved.eval_steps(config) == 0:
                    self.evaluate()
                if last or run.step % config.save_steps == 0:
                    run.save(self.policy, {})

    def train_step(self, batch: list[int]) -> None:
        """The loss is the mean over all trained tokens of the batch, wherever they lie."""
        rows, run = self.rows, self.run
        with run.timer.phase("train"):
            step = self.policy.train(
                [rows.pointer(row) for row in batch],
                rows.lengths[batch].tolist(),
                {"weight": row_weights(rows.loss_lengths[batch], "sft")},
                {},
                run.step,
            )
        run.record({**step.metrics, **report.step_metrics(run, step, self.schedule.steps_per_epoch)})

    def evaluate(self) -> None:
        """Loss and token accuracy on the held-out rows."""
        rows = self.held_out
        if rows is None:
            return
        weights = row_weights(rows.loss_lengths, "sft")
        pointers = [rows.pointer(row) for row in range(len(rows))]
        metrics = self.policy.evaluate(pointers, rows.lengths.tolist(), weights).result()
        self.run.record_evaluation({f"eval_{name}": value for name, value in metrics.items()})
