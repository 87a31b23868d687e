"""Online reinforcement learning: sample, score, credit, train, publish, again.

The controller moves references and scalars; the tensors stay with the workers. `OnlineRun.train` is the
algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.aggregation import lengths_in_loss, row_weights
from raytune_rl.algorithms.before_step import OnlineStep
from raytune_rl.algorithms.credit.base import Credit, Credited
from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, TEACHER_LOGPROBS
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.errors import ConfigError
from raytune_rl.groups import specs, teacher_specs
from raytune_rl.groups.engine_fit import fit
from raytune_rl.groups.fleet import batch_of
from raytune_rl.groups.growth import check_growth
from raytune_rl.groups.sizes import online_groups
from raytune_rl.groups.start import OnlineGroups, OnlineSetup, start_groups
from raytune_rl.groups.teachers import as_seen
from raytune_rl.pipelines import dry_run, memory, report, run_metrics
from raytune_rl.pipelines.ahead import AheadCollector
from raytune_rl.pipelines.collect import Collected, Collector, Collects
from raytune_rl.pipelines.engine_guard import METRIC, EngineGuard
from raytune_rl.pipelines.generation_log import GenerationLog
from raytune_rl.pipelines.going_on import going_on
from raytune_rl.pipelines.group_flow import Outside
from raytune_rl.pipelines.lifecycle import ResumePoint, Run, RunResult, note, stage
from raytune_rl.pipelines.local_paths import made_absolute
from raytune_rl.pipelines.online_algorithms import Algorithm, algorithm_of
from raytune_rl.pipelines.online_data import OnlineData, read_data, rewards_checked
from raytune_rl.pipelines.prompt_quarantine import PromptQuarantine
from raytune_rl.pipelines.recovery import rules_of
from raytune_rl.pipelines.rescue import Rescue
from raytune_rl.pipelines.resume_point import open_run
from raytune_rl.pipelines.run_models import RunModels, RunStep
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.pipelines.run_summary import online_summary
from raytune_rl.pipelines.scoring import Scoring
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime import gpu_memory
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.copies import Copies
from raytune_rl.runtime.places import places_for
from raytune_rl.workers.imports import SAMPLING, TRAINING


def run(config: RLHFConfig, notices: Sequence[str] = ()) -> RunResult:
    """Trains a policy by GRPO and its kin, or by PPO, on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        notices: Sentences for the user, shown with the plan.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    return going_on(config, partial(_run, notices=notices))


def _run(config: RLHFConfig, notices: Sequence[str]) -> RunResult:
    """A run from its beginning, or a checkpoint, to its end."""
    dry_run.refuse(config)
    config = made_absolute(config)
    algorithm = algorithm_of(config)
    rewards = rewards_checked(config)
    with ExitStack() as stack:
        with stage("connecting to Ray"):
            cluster = stack.enter_context(session(config.ray_address, note, [TRAINING, SAMPLING]))
        groups = online_groups(config, cluster, algorithm.needs)
        specs.check_machine(config, groups.on_gpu)
        growth = check_growth(groups, cluster)
        resume_point = stack.enter_context(open_run(config))
        ranks, one_machine = groups["policy"].workers, cluster.started_here
        data = read_data(config, algorithm, ranks, rewards, resume_point, one_machine=one_machine)
        account = data.train.account
        teacher_specs.check(config, groups, account.takes_media)
        said = [
            *notices,
            *resume_point.notices,
            *data.notices,
            *specs.machine_notices(config, groups.on_gpu),
            *growth,
            *specs.media_notices(config, groups.on_gpu, account.takes_media),
        ]
        config, fitted = fit(config, account.traits, groups.on_gpu, account.takes_media)
        said += fitted
        plan = report.online_plan(config, algorithm, groups, data, resume_point, cluster, said)
        plan, no_room = memory.added(
            plan,
            config,
            groups,
            gpu_memory.of(cluster),
            max_model_len=data.max_model_len,
            store_bytes=cluster.object_store_bytes,
        )
        media = specs.prompt_limits(config, account.takes_media, [s.account.media for s in data.sets])
        controlled = Run(
            config, resume_point, data.schedule.total_steps, best_by="eval_reward", greater_is_better=True
        )
        controlled.say(plan.render())
        if no_room is not None:
            raise no_room
        state = RunState.restored(resume_point.state)

        def lost(group: str, message: str) -> None:
            """A worker was lost and is replaced: said and counted."""
            state.lost_workers[group] += 1
            controlled.faults.replaced(group, message)

        slots = stack.enter_context(reserve(groups.fixed, config.start_timeout))
        if groups.elastic is not None:
            own_places = places_for(groups["rollout"], config.start_timeout)
            slots["rollout"] = stack.enter_context(own_places)
        with stage("starting the actors"):
            setup = OnlineSetup(
                config=config,
                sizes=groups,
                loss=algorithm.loss,
                needs=algorithm.needs,
                prompts=data.train,
                total_steps=data.schedule.total_steps,
                run_name=resume_point.run_dir.path.name,
                max_model_len=data.max_model_len,
                media=media,
                longest_taught=data.longest_taught,
            )
            worlds = 1 + ("critic" in groups)
            copies = Copies()
            stack.callback(copies.end)
            rules = rules_of(config, controlled.faults, cluster.object_store_bytes, worlds, copies.keep)
            actors = start_groups(setup, slots, stack, rules, lost)
            online = OnlineRun(config, algorithm, data, controlled, state, actors)
            online.restore(resume_point)
        with controlled.watched(), online.rescue.ready():
            online.train()
            result = controlled.finish({"prompts": state.account().as_dict()})
        accounts = (account, None if data.held_out is None else data.held_out.account)
        online_summary(config, controlled, state, accounts, result).show(controlled.console)
        return result


class OnlineRun:
    """The loop over the groups of one run.

    Args:
        config: Of the run.
        algorithm: Loss and credit.
        data: What it samples from and learns beside, and its steps.
        run: Directory, log, display and checkpoints.
        state: What the run has come to.
        actors: The groups.
        outside: The world of the collectors.
    """

    def __init__(
        self,
        config: RLHFConfig,
        algorithm: Algorithm,
        data: OnlineData,
        run: Run,
        state: RunState,
        actors: OnlineGroups,
        outside: Outside = Outside(),  # noqa: B008, frozen
    ) -> None:
        self.config, self.algorithm, self.experts = config, algorithm, data.experts
        self.schedule, self.prompts = schedule, prompts = data.schedule, data.train
        self.held_out = data.held_out if resolved.eval_strategy(config) != "no" else None
        self.run, self.state, self.actors = run, state, actors
        self.credit: Credit = algorithm.credit
        given_up = PromptQuarantine(run.dir.quarantine_prompts_jsonl, config.step_timeout)
        scoring = Scoring(config, actors, state, run.say, given_up.add)
        self.collector: Collects
        if resolved.max_staleness(config):
            self.collector = AheadCollector(
                config, actors, prompts, schedule, state, self.credit, scoring, run.say, outside
            )
        else:
            each = schedule.batch.prompts_per_generation
            self.collector = Collector(
                config, actors, prompts, each, state, self.credit, scoring, outside, data.demonstrations
            )
        self.generation_log = GenerationLog(config, self.credit, run.completions, prompts, state, run.say)
        ahead = resolved.max_staleness(config) > 0
        new_as_they_come = ahead or actors.sizes.elastic is not None

        def restarts() -> int:
            """A number that rises with each engine that is started: once it serves, where nobody waits for
            it; else as soon as it is to be."""
            return actors.rollout.load().admitted if new_as_they_come else state.lost_workers["rollout"]

        ready = self.collector.ready
        self.guard = EngineGuard(
            config, actors, prompts, actors.sizes.on_gpu, restarts, ready, ahead, run.say
        )
        self.version = -1
        self.rescue = Rescue(run, actors.learners)
        # What is asked ahead, and models that follow, are saved in checkpoints alone.
        self.can_be_rescued = not ahead and not actors.followers

    def restore(self, resume_point: ResumePoint) -> None:
        """Loads the checkpoint that the run goes on from, if it does."""
        if resume_point.checkpoint is None:
            return
        self.collector.load(resume_point.checkpoint)
        self.actors.learners.load(resume_point.checkpoint)
        for follower in self.actors.followers:
            follower.load(resume_point.checkpoint / follower.name)

    # -- the loop
    # ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """GRPO (Shao et al. 2024, algorithm 1) over references; its kin differ in what the parts are told.

        The collector decides whether sampling goes on while the policy trains: synchronously nothing is
        asked ahead, and nothing goes on.
        """
        run, state = self.run, self.state
        self.publish(state.generation)
        if run.step == 0:
            self.evaluate()
        run.timer.finish()
        ended = run.ends()
        while not ended:
            collected = self.collector.collect(state.generation, self.version, self.progress(), run.timer)
            self.guard.prove(self.version)
            self.actors.gpu_sharing.to_policy()
            with self.collector.going_on():
                credited = self.credited(collected)
                metrics = self.generation_log.tell(run.step + 1, collected, credited)
                for part in self.optimizer_steps(len(credited.batch)):
                    self.train_step(collected.kept.batch[part], credited, part, metrics)
                    if run.step >= self.schedule.total_steps:
                        break
            state.generation += 1
            with run.timer.phase("sync"):
                self.publish(state.generation)
            with run.timer.paused():
                ended = self.after_generation()
            if self.can_be_rescued:
                self.rescue.mark(state.as_dict())

    def credited(self, collected: Collected) -> Credited:
        """The advantages of the completions, in a batch that has all that the loss needs."""
        experience, actors, timer = collected.kept, self.actors, self.run.timer
        trajectories = batch_of(experience.batch)
        batch = trajectories
        if actors.reference is not None:
            with timer.phase("reference"):
                batch = batch.with_columns(ref_logprobs=actors.reference.logprobs(trajectories).columns)
        teachers, needs = actors.teachers, self.algorithm.needs
        taught = not needs.isdisjoint({*TEACHER_COLUMNS, TEACHER_LOGPROBS})
        advises = teachers is not None and not taught
        if not self.schedule.batch.on_policy or "old_logprobs" in self.credit.needs or advises:
            with timer.phase("train"):
                batch = batch.with_columns(old_logprobs=actors.policy.logprobs(trajectories).columns)
        credited = self.credit.assign(experience, batch, RunModels(actors.policy, actors.critic, timer))
        if teachers is None:
            return credited
        with timer.phase("teacher"):
            whose = self.whose(experience.batch)
            seen = as_seen(batch, experience.batch, self.prompts)
            if advises:
                return teachers.advise(seen, credited, whose, self.credit.advice(self.run.step))
            known = {}
            if TEACHER_LOGPROBS in needs:
                known[TEACHER_LOGPROBS] = teachers.logprobs(seen, whose)
            if not needs.isdisjoint(TEACHER_COLUMNS):
                known |= teachers.distributions(seen, whose, self.config.gkd_logits_topk or 0)
            given = [float(collected.demonstrated)] * len(batch)
            return replace(
                credited, batch=credited.batch.with_columns(**known).with_scalars(off_policy=given)
            )

    def whose(self, trajectories: Sequence[Trajectory]) -> NDArray[np.int64] | None:
        """The teacher of each completion; None where all teachers judge all of them."""
        teacher = self.prompts.values.get("teacher")
        return None if teacher is None else teacher[[t.prompt for t in trajectories]].astype(np.int64)

    def optimizer_steps(self, size: int) -> list[slice]:
        """The parts of a generation batch that make one optimizer step each, over all iterations."""
        count = self.schedule.batch.optimizer_steps_per_generation
        part = size // count
        once = [slice(k * part, (k + 1) * part) for k in range(count)]
        return once * self.config.num_iterations

    def train_step(
        self,
        trajectories: Sequence[Trajectory],
        credited: Credited,
        part: slice,
        metrics: dict[str, float],
    ) -> None:
        """One optimizer step on a part of the batch; `metrics` are those of its generation."""
        run, config = self.run, self.config
        tokens = lengths_in_loss(
            [t.episode.completion_tokens for t in trajectories],
            [t.episode.finish_reason == "length" for t in trajectories],
            config.overlong_filter,
        )
        batch = credited.batch.part(part).with_scalars(
            weight=row_weights(tokens, self.algorithm.loss.normaliser, config.max_completion_length),
            row_weight=(tokens > 0) / len(trajectories),
            advantage=credited.advantages[part],
        )
        with run.timer.phase("train"):
            if config.top_entropy_quantile < 1:
                batch = self.with_entropy_threshold(batch, batch_of(trajectories), tokens)
            if self.algorithm.before_step is not None:
                batch = self.prepared(batch, trajectories, tokens)
            if self.experts is not None:
                batch = self.experts.mixed(batch, run.step)
            step = self.actors.learners.train(batch, run.step)
        # Older weights sampled other log-probs: that is no defect, and such a step is not looked at.
        fresh = all(t.episode.version == self.version for t in trajectories)
        if fresh:
            gap = step.metrics.get("rollout_correction/logp_abs_diff_max", 0.0)
            self.state.max_gap = max(self.state.max_gap, gap)
        counters = run_metrics.step_metrics(run, step, self.schedule.steps_per_epoch)
        counters["weight_store(GiB)"] = self.published.held_nbytes / 2**30
        if config.weight_delta:
            counters["weight_delta/published_share"] = self.published.sent_nbytes / self.published.nbytes
        if self.state.lost_workers:
            counters["lost_workers"] = float(self.state.lost_workers.total())
        if self.actors.sizes.elastic is not None:
            counters |= run_metrics.fleet_metrics(self.actors.rollout.load())
        run.record({**step.metrics, **counters, **metrics})
        self.guard.watch(step.metrics.get(METRIC) if fresh else None, run.step)

    def with_entropy_threshold(
        self, batch: TrainBatch, rows: TrainBatch, tokens: NDArray[np.int64]
    ) -> TrainBatch:
        """The batch with entropies under the present weights, and the one that a token must have to be
        trained on."""
        policy = self.actors.policy
        entropies = policy.entropies(rows)
        kept = np.flatnonzero(tokens).tolist()
        counted = rows.with_columns(entropy=entropies).part(kept)
        threshold = policy.entropy_threshold(counted, tokens[kept].tolist(), self.config.top_entropy_quantile)
        return batch.with_columns(entropy=entropies).with_scalars(
            entropy_threshold=np.full(len(batch), threshold)
        )

    def prepared(
        self, batch: TrainBatch, trajectories: Sequence[Trajectory], tokens: NDArray[np.int64]
    ) -> TrainBatch:
        """The batch with what the loss works out of the whole step first.

        Raises:
            ConfigError: The credit gives each token an advantage of its own, and the loss asks for one a row.
        """
        before_step = self.algorithm.before_step
        assert before_step is not None
        if "advantages" in batch.columns:
            raise ConfigError(
                f"--loss_type {self.config.loss_type} takes one advantage a completion, but "
                f"--advantage_estimator {self.config.advantage_estimator} (or --teacher_kl_coef) gives one a "
                "token."
            )
        advantages = batch.scalars["advantage"]
        groups = np.array([t.group for t in trajectories])
        step = OnlineStep(self.run.step, self.config.seed, groups, advantages, tokens)
        rows, old = batch_of(trajectories), batch.columns.get("old_logprobs")
        models = RunStep(self.actors.policy, rows, old, advantages, tokens)
        values = before_step(step, models)
        return batch.with_scalars(**values.row_values).with_columns(**values.columns)

    def publish(self, version: int) -> None:
        """Makes the policy's weights the newest version and waits until every engine serves it."""
        actors = self.actors
        actors.gpu_sharing.to_policy()
        with self.collector.going_on():
            manifest = actors.policy.publish(version)
            actors.store.publish(manifest)
        self.collector.serve(version)
        self.version, self.published = version, manifest
        self.guard.prove(version)
        if not self.run.stop_requested:
            self.collector.ask_ahead(self.progress())

    def after_generation(self) -> bool:
        """Does what is due: moves of models that follow the policy, evaluation, checkpoint. A step inside a
        generation counts at its end.

        Returns:
            Whether the run ends here.
        """
        run, config, epoch = self.run, self.config, self.schedule.steps_per_epoch
        per = self.schedule.batch.optimizer_steps_per_generation * config.num_iterations
        for follower in self.actors.followers:
            if due(run.step, per, follower.every):
                follower.mix(self.published)
        if run.ends() or due(run.step, per, resolved.evaluation_interval(config, epoch)):
            self.evaluate()
        ended = run.ends()
        if ended or due(run.step, per, resolved.checkpoint_interval(config, epoch)):
            self.actors.gpu_sharing.to_policy()
            self.collector.finish_scoring()
            run.save(self, self.state.as_dict())
        return ended

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes a checkpoint's model, and what else has to be as it was for an exact resume."""
        if not only_model:
            self.collector.save(directory)
        with self.collector.going_on():
            self.actors.learners.save(directory, only_model)
            for follower in () if only_model else self.actors.followers:
                follower.save(directory / follower.name)

    def evaluate(self) -> None:
        """Rewards of completions of the held-out prompts."""
        if self.held_out is None:
            return
        experience = self.collector.held_out(self.held_out, self.version, self.progress())
        self.run.record_evaluation(run_metrics.evaluation_metrics(experience))

    def progress(self) -> TrainerState:
        """How far the run has come, as reward functions are told."""
        return TrainerState(self.run.step, self.run.total_steps)


def due(step: int, window: int, every: int) -> bool:
    """Whether a multiple of `every` lies among the last `window` steps up to `step`."""
    return step // every > max(step - window, 0) // every
