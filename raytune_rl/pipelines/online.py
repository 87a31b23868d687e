"""Online reinforcement learning: sample, score, compare within groups, train, publish, again.

The controller moves references and scalars; the tensors stay with the workers. `OnlineRun.train` is the
algorithm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.advantages import (
    AdvantageResult,
    decoupled_advantages,
    group_advantages,
    penalised_rewards,
)
from raytune_rl.algorithms.aggregation import lengths_in_loss, row_weights
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.batching import GRPOSchedule, grpo_schedule_of
from raytune_rl.groups import specs
from raytune_rl.groups.engine_fit import fit
from raytune_rl.groups.fleet import media_places
from raytune_rl.groups.logprobs import ReferenceGroup
from raytune_rl.groups.sizes import Groups, online_groups
from raytune_rl.groups.start import start_groups
from raytune_rl.multi_turn.scheduler import make_scheduler
from raytune_rl.pipelines import report
from raytune_rl.pipelines.collect import Collector
from raytune_rl.pipelines.engine_guard import METRIC, EngineGuard
from raytune_rl.pipelines.experience import Experience, known_values
from raytune_rl.pipelines.generation_log import GenerationLog
from raytune_rl.pipelines.lifecycle import Origin, Run, RunResult, find_origin, note, stage
from raytune_rl.pipelines.local_paths import made_absolute
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.prepare.sets import check_lengths, prompt_sets
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.train import Algorithm
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.rewards.judge import plugin_class
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.preflight import preflight
from raytune_rl.rewards.sandbox import memory_limit_bytes
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.wait import Pending, fetch


def run(config: RLHFConfig, notices: Sequence[str] = (), kind: type[OnlineRun] | None = None) -> RunResult:
    """Trains a policy by GRPO and its kin on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        notices: Sentences for the user, shown with the plan.
        kind: The run's class, if it differs from `OnlineRun`.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    config = made_absolute(config)
    algorithm = algorithm_of(config)
    with stage("loading the reward functions"):
        if config.multi_turn_scheduler is not None or config.reward_model_plugin:
            # As the workers will: a wrong name ends the run here.
            load_plugins(config.external_plugins)
        if config.multi_turn_scheduler is not None:
            make_scheduler(config.multi_turn_scheduler, config.max_turns)
        for name in config.reward_model_plugin:
            plugin_class(name)
        limit = memory_limit_bytes(config.reward_memory_limit)
        needs = preflight(config.reward_funcs, config.external_plugins, config.args(), limit)
    with ExitStack() as stack:
        with stage("connecting to Ray"):
            cluster = stack.enter_context(session(config.ray_address, note))
        groups = online_groups(config, cluster)
        specs.check_machine(config, groups.on_gpu)
        origin = find_origin(config)
        with stage("reading and tokenizing the data") as tell:
            train, held_out = prompt_sets(
                config, origin.run_dir.quarantine_jsonl, one_machine=cluster.started_here, tell=tell
            )
        needs.check([*train.account.columns, *(f"{kind}s" for kind in train.account.media.kinds)])
        specs.check_readable(config, train.account.media)
        schedule = grpo_schedule_of(config, groups["policy"].workers, len(train))
        longest = max(int(s.lengths.max()) for s in (train, held_out) if s is not None)
        limit = check_lengths(
            longest, config.max_completion_length, config.vllm_max_model_len, train.account.max_positions
        )
        told = [
            *notices,
            *origin.notices,
            *train.account.notices,
            *specs.machine_notices(config, groups.on_gpu),
            *specs.media_notices(config, groups.on_gpu, train.account.takes_media),
        ]
        config, fitted = fit(config, train.account.traits, groups.on_gpu)
        told += fitted
        plan = report.online_plan(config, groups, schedule, train, held_out, longest, origin, cluster, told)
        started = (kind or OnlineRun)(config, algorithm, groups, schedule, train, held_out, origin)
        started.run.say(plan.render())
        slots = stack.enter_context(reserve(groups.specs, config.start_timeout))
        with stage("starting the actors"):
            started.start(slots, limit, stack)
        with started.run.watched():
            started.train()
            result = started.run.finish({"prompts": started.collector.account().as_dict()})
        report.online_summary(config, started, result).show(started.run.console)
        return result


class OnlineRun:
    """The groups of one run and the loop over them."""

    LOG: type[GenerationLog] = GenerationLog

    def __init__(
        self,
        config: RLHFConfig,
        algorithm: Algorithm,
        groups: Groups,
        schedule: GRPOSchedule,
        train: PromptSet,
        held_out: PromptSet | None,
        origin: Origin,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.groups = groups
        self.schedule = schedule
        self.prompts = train
        self.held_out = held_out
        self.origin = origin
        shown = [s.account.media for s in (train, held_out) if s is not None]
        self.media = specs.prompt_limits(config, train.account.takes_media, shown)
        self.run = Run(config, origin, schedule.total_steps, best_by="eval_reward", greater_is_better=True)
        self.max_gap = float(origin.state.get("max_gap", 0.0))
        self.lost_workers: Counter[str] = Counter(origin.state.get("lost_workers", {}))
        self.generation_log = self.LOG(config, origin, train, self.run.say)
        self.version = -1

    def start(self, slots: Mapping[str, Any], max_model_len: int, stack: ExitStack) -> None:
        """Starts all actors at once and waits for them."""
        workers = start_groups(
            self.config,
            self.groups,
            self.algorithm,
            self.prompts,
            total_steps=self.schedule.total_steps,
            run_name=self.origin.run_dir.path.name,
            slots=slots,
            max_model_len=max_model_len,
            media=self.media,
            stack=stack,
            say=self.run.say,
            lost=self.lost,
        )
        self.policy, self.rollout, self.turns = workers.policy, workers.rollout, workers.turns
        self.reference, self.store = workers.reference, workers.store
        self.collector = Collector(
            self.config,
            workers,
            self.prompts,
            self.schedule.batch.prompts_per_generation,
            self.origin.state,
            self.run.say,
        )
        restarts = partial(self.lost_workers.__getitem__, "rollout")
        self.guard = EngineGuard(
            self.config, workers, self.prompts, self.groups.on_gpu, restarts, self.run.say
        )
        if self.origin.checkpoint is not None:
            self.policy.load(self.origin.checkpoint)
            if self.config.sync_ref_model and isinstance(self.reference, ReferenceGroup):
                self.reference.load(self.origin.checkpoint / REFERENCE)

    def lost(self, group: str, message: str) -> None:
        """A worker was lost and is replaced: said and counted."""
        self.lost_workers[group] += 1
        self.run.say(f"Note: {message}")

    # -- the loop
    # ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """GRPO (Shao et al. 2024, algorithm 1) over references; its kin differ in what the parts are told."""
        run = self.run
        generation = int(self.origin.state.get("generation", 0))
        self.publish(generation)
        if run.step == 0:
            self.evaluate()
        run.timer.finish()
        while run.step < self.schedule.total_steps and not run.stop_requested:
            collected = self.collector.collect(generation, self.version, self.progress(), run.timer)
            batch = collected.kept.batch
            self.guard.prove(self.version)
            self.turns.to_policy()
            late = self.late_columns(batch)
            compared, kl = self.credit(collected.kept, late)
            told = self.generation_log.tell(run.step + 1, collected, compared, kl)
            for part in self.optimizer_steps(len(batch)):
                self.train_step(batch, compared, late, part, told)
                if run.step >= self.schedule.total_steps:
                    break
            generation += 1
            last = run.step >= self.schedule.total_steps
            with run.timer.phase("sync"):
                self.publish(generation)
            with run.timer.paused():
                self.after_generation(generation, last)

    def late_columns(self, batch: Sequence[Trajectory]) -> dict[str, list[Any]]:
        """What lies beside the trajectories: the media of their prompts, and the log-probs that the loss
        needs beside the policy's own (the reference's, and the old policy's if it will move).
        """
        rows, lengths = [t.data for t in batch], [t.length for t in batch]
        media = media_places(batch)
        late: dict[str, list[Any]] = {**media}
        if self.reference is not None:
            with self.run.timer.phase("reference"):
                late["ref_logprobs"] = self.reference.logprobs(rows, lengths, media).columns
        if not self.schedule.batch.on_policy:
            with self.run.timer.phase("train"):
                late["old_logprobs"] = self.policy.logprobs(rows, lengths, media).columns
        return late

    def credit(
        self, experience: Experience, late: dict[str, list[Any]]
    ) -> tuple[AdvantageResult, NDArray[np.float64] | None]:
        """What each completion earned, and the KL that was taken off its reward; `late` is as the loss will
        have it."""
        kl = self.kl_to_take_off(experience.batch, late)
        return self.compare(experience, kl), kl

    def kl_to_take_off(
        self, batch: Sequence[Trajectory], late: dict[str, list[Any]]
    ) -> NDArray[np.float64] | None:
        """With the KL in the reward: each completion's. The loss then needs no reference any more."""
        if not resolved.kl_in_reward(self.config):
            return None
        rows, lengths = [t.data for t in batch], [t.length for t in batch]
        with self.run.timer.phase("train"):
            old = late.get("old_logprobs")
            if old is None:
                old = self.policy.logprobs(rows, lengths, media_places(batch)).columns
            ref = late.pop("ref_logprobs")
            return self.policy.row_kl(rows, lengths, old, ref, resolved.kl_estimator(self.config))

    def compare(self, experience: Experience, kl: NDArray[np.float64] | None) -> AdvantageResult:
        """Advantages of completions over the others of their group."""
        config, rewards = self.config, experience.rewards
        if kl is not None:
            rewards = penalised_rewards(rewards, kl, config.beta)
        groups = [t.group for t in experience.batch]
        if config.scale_rewards == "gdpo":
            weights = resolved.reward_weights(config)
            found = decoupled_advantages(known_values(experience.scored, weights), weights, groups)
            return replace(group_advantages(rewards, groups), advantages=found)
        return group_advantages(rewards, groups, config.scale_rewards, estimator=config.advantage_estimator)

    def optimizer_steps(self, size: int) -> list[slice]:
        """The parts of a generation batch that make one optimizer step each, over all iterations."""
        count = self.schedule.batch.optimizer_steps_per_generation
        part = size // count
        once = [slice(k * part, (k + 1) * part) for k in range(count)]
        return once * self.config.num_iterations

    def train_step(
        self,
        batch: Sequence[Trajectory],
        compared: AdvantageResult,
        late: Mapping[str, Sequence[Any]],
        part: slice,
        told: Mapping[str, float],
    ) -> None:
        """One optimizer step on a part of the batch."""
        run, config, rows = self.run, self.config, batch[part]
        tokens = lengths_in_loss(
            [t.completion_tokens for t in rows],
            [t.finish_reason == "length" for t in rows],
            config.overlong_filter,
        )
        scalars: dict[str, Any] = {
            "weight": row_weights(tokens, self.algorithm.normaliser, config.max_completion_length),
            "row_weight": (tokens > 0) / len(rows),
            "advantage": compared.advantages[part],
        }
        columns = {name: column[part] for name, column in late.items()}
        with run.timer.phase("train"):
            if config.top_entropy_quantile < 1:
                columns["entropy"], threshold = self.entropy_filter(rows, tokens)
                scalars["entropy_threshold"] = np.full(len(rows), threshold)
            data, lengths = [t.data for t in rows], [t.length for t in rows]
            step = self.policy.train(data, lengths, scalars, columns, run.step)
        gap = step.metrics.get("rollout_correction/logp_abs_diff_max", 0.0)
        self.max_gap = max(self.max_gap, gap)
        counters = report.step_metrics(run, step, self.schedule.steps_per_epoch)
        if self.lost_workers:
            counters["lost_workers"] = float(self.lost_workers.total())
        run.record({**step.metrics, **counters, **told})
        self.guard.watch(step.metrics.get(METRIC), run.step)

    def entropy_filter(
        self, rows: Sequence[Trajectory], tokens: NDArray[np.int64]
    ) -> tuple[list[Any], float]:
        """Entropies under the present weights, and the one that a token must have to be trained on."""
        data, lengths = [t.data for t in rows], [t.length for t in rows]
        found = self.policy.entropies(data, lengths, media_places(rows))
        kept = np.flatnonzero(tokens)
        threshold = self.policy.entropy_threshold(
            [rows[i].data for i in kept],
            tokens[kept].tolist(),
            [found[i] for i in kept],
            self.config.top_entropy_quantile,
        )
        return found, threshold

    def publish(self, version: int) -> None:
        """Makes the policy's weights the newest version and waits until every engine serves it."""
        self.turns.to_policy()
        manifest = self.policy.publish(version)
        fetch(
            Pending(
                self.store.publish.remote(manifest),
                "the weight store",
                "publishing",
                self.config.step_timeout,
            )
        )
        self.turns.to_rollout()
        self.rollout.load(version)
        self.version, self.published = version, manifest
        self.guard.prove(version)

    def after_generation(self, generation: int, last: bool) -> None:
        """What is due: the reference's move, evaluation, checkpoint. A step inside a generation counts at its
        end.
        """
        run, config, epoch = self.run, self.config, self.schedule.steps_per_epoch
        per = self.schedule.batch.optimizer_steps_per_generation * config.num_iterations
        moves = config.sync_ref_model and due(run.step, per, config.ref_model_sync_steps)
        if moves and isinstance(self.reference, ReferenceGroup):
            self.reference.mix(self.published, config.ref_model_mixup_alpha)
        if last or run.stop_requested or due(run.step, per, resolved.evaluation_interval(config, epoch)):
            self.evaluate()
        if last or run.stop_requested or due(run.step, per, resolved.checkpoint_interval(config, epoch)):
            state = {
                "generation": generation,
                "max_gap": self.max_gap,
                "lost_workers": dict(self.lost_workers),
                **self.generation_log.state(),
                **self.collector.state(),
            }
            self.turns.to_policy()
            run.save(self, state)

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes a checkpoint's model, and what else has to be as it was for an exact resume."""
        self.policy.save(directory, only_model)
        if self.config.sync_ref_model and isinstance(self.reference, ReferenceGroup) and not only_model:
            self.reference.save(directory / REFERENCE)

    def evaluate(self) -> None:
        """Rewards of completions of the held-out prompts."""
        if self.held_out is None:
            return
        found = self.collector.held_out(self.held_out, self.version, self.progress())
        self.run.record_evaluation(report.evaluation_metrics(found))

    def progress(self) -> TrainerState:
        """How far the run has come, as reward functions are told."""
        return TrainerState(self.run.step, self.run.total_steps)


REFERENCE = "reference"
"""Folder of a checkpoint with the weights of a reference that moves."""


def due(step: int, window: int, every: int) -> bool:
    """Whether a multiple of `every` lies among the last `window` steps up to `step`."""
    return step // every > max(step - window, 0) // every
