"""Online reinforcement learning: sample, score, compare within groups, train, publish, again.

The controller moves references and scalars; the tensors stay with the workers. `OnlineRun.train` is the
algorithm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import ray

from raytune_rl.algorithms.advantages import AdvantageResult, combine_rewards, group_advantages
from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.policy_loss import GRPOSettings
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.batching import GRPOSchedule, grpo_schedule_of
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.pipelines import launch, report
from raytune_rl.pipelines.data import PromptSet, check_lengths, prompt_sets
from raytune_rl.pipelines.lifecycle import Origin, Run, RunResult, find_origin, stage
from raytune_rl.pipelines.policy_group import PolicyGroup, score_rows
from raytune_rl.pipelines.resources import Groups, online_groups
from raytune_rl.pipelines.rollouts import (
    RewardGroup,
    RolloutGroup,
    Scored,
    Trajectory,
    picture_places,
    read_texts,
)
from raytune_rl.pipelines.turns import Turns
from raytune_rl.rewards.types import TrainerState
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch
from raytune_rl.runtime.weights import start_store
from raytune_rl.tracking.completions import CompletionLog
from raytune_rl.workers.policy import PolicyWorker, policy_env
from raytune_rl.workers.reference import ReferenceWorker
from raytune_rl.workers.reward import RewardWorker
from raytune_rl.workers.rollout import RolloutWorker, rollout_env


def run(config: RLHFConfig, notices: Sequence[str] = ()) -> RunResult:
    """Trains a policy by GRPO on a Ray cluster, joined or started here.

    Args:
        config: What to do.
        notices: Sentences for the user, shown with the plan.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    with ExitStack() as stack:
        with stage("connecting to Ray"):
            cluster = stack.enter_context(session(config.ray_address))
        groups = online_groups(config, cluster)
        origin = find_origin(config)
        with stage("reading and tokenizing the data"):
            train, held_out = prompt_sets(
                config, origin.run_dir.quarantine_jsonl, one_machine=cluster.started_here
            )
        schedule = grpo_schedule_of(config, groups["policy"].workers, len(train))
        longest = max(int(s.lengths.max()) for s in (train, held_out) if s is not None)
        limit = check_lengths(
            longest, config.max_completion_length, config.vllm_max_model_len, train.account.max_positions
        )
        told = [
            *notices,
            *origin.notices,
            *train.account.notices,
            *launch.machine_notices(config, groups.on_gpu),
            *launch.image_notices(config, groups.on_gpu, train.account.vision),
        ]
        plan = report.online_plan(config, groups, schedule, train, held_out, longest, origin, cluster, told)
        started = OnlineRun(config, groups, schedule, train, held_out, origin)
        started.run.say(plan.render())
        slots = stack.enter_context(reserve(groups.specs, config.start_timeout))
        with stage("starting the actors"):
            started.start(slots, limit, stack)
        with started.run.watched():
            started.train()
            result = started.run.finish()
        report.online_summary(config, started, result).show(started.run.console)
        return result


class OnlineRun:
    """The groups of one run and the loop over them."""

    def __init__(
        self,
        config: RLHFConfig,
        groups: Groups,
        schedule: GRPOSchedule,
        train: PromptSet,
        held_out: PromptSet | None,
        origin: Origin,
    ) -> None:
        self.config = config
        self.groups = groups
        self.schedule = schedule
        self.prompts = train
        self.held_out = held_out
        self.origin = origin
        most = max(s.account.images.most for s in (train, held_out) if s is not None)
        self.media = launch.media_limits(config, train.account.vision, most)
        self.run = Run(config, origin, schedule.total_steps, best_by="eval_reward", greater_is_better=True)
        self.order = BatchPlan(
            len(train), schedule.batch.prompts_per_generation, config.data_seed, config.dataset_shuffle
        )
        self.completion_log = CompletionLog(origin.run_dir, resume_step=origin.resume_step)
        self.reward_failures: Counter[str] = Counter(origin.state.get("reward_failures", {}))
        self.prompt_counts: Counter[str] = Counter(origin.state.get("prompt_counts", {}))
        self.max_gap = float(origin.state.get("max_gap", 0.0))
        self.version = -1

    # -- starting
    # ---------------------------------------------------------------------------------------------

    def start(self, slots: Mapping[str, Any], max_model_len: int, stack: ExitStack) -> None:
        """Starts all actors at once and waits for them; the policy's weights become the first version."""
        config, groups, account = self.config, self.groups, self.prompts.account
        store_name = f"weights-{ray.get_runtime_context().get_job_id()}-{self.origin.run_dir.path.name}"
        self.store = start_store(store_name)
        stack.callback(ray.kill, self.store)

        def group(name: str, worker: type, make: Any, env: Mapping[str, str]) -> WorkerGroup:
            made = WorkerGroup(groups[name], slots[name], worker, make, env, config.step_timeout)
            stack.callback(made.shutdown)
            return made

        spec = launch.policy_spec(
            config,
            groups,
            self.schedule.total_steps,
            loss="grpo",
            loss_settings=GRPOSettings(
                epsilon=config.epsilon,
                epsilon_high=config.epsilon_high,
                delta=config.delta,
                beta=config.beta,
            ),
            temperature=config.temperature,
            dropout=0.0,
            publish_mode=launch.publish_mode(config, account.vision),
            vision=account.vision,
            banned=account.placeholder_ids,
        )
        budget = launch.max_tokens(config, groups.on_gpu)
        ranks = groups["policy"].workers
        policy = group(
            "policy",
            PolicyWorker,
            lambda rank: {"spec": spec, "rank": rank, "world_size": ranks},
            policy_env(groups.threads["policy"], groups.on_gpu),
        )
        rollout = group(
            "rollout",
            RolloutWorker,
            lambda rank: {
                "spec": launch.engine_spec(config, groups, max_model_len, store_name, rank, self.media)
            },
            rollout_env(groups.threads["rollout"], config.vllm_tensor_parallel_size, groups.on_gpu),
        )
        rewards = group(
            "reward",
            RewardWorker,
            lambda _: {
                "names": config.reward_funcs,
                "plugin_files": config.external_plugins,
                "config_dict": config.args(),
                "timeout_s": config.reward_timeout,
            },
            {"OMP_NUM_THREADS": "1"},
        )
        self.reference: WorkerGroup | None = None
        if "reference" in groups:
            self.reference = group(
                "reference",
                ReferenceWorker,
                lambda _: {"spec": spec.model, "settings": spec.score},
                policy_env(groups.threads["reference"], groups.on_gpu),
            )
        self.policy = PolicyGroup(policy, spec, budget, config.start_timeout)
        for started in (rewards, rollout, *([self.reference] if self.reference else [])):
            started.call("ping", what="starting", timeout_s=config.start_timeout)
        facts = self.policy.ready()
        for notice in facts.notices:
            self.run.say(f"Note: {notice}")
        self.rollout = RolloutGroup(
            rollout,
            launch.sampling(config, account.stop_token_ids, account.placeholder_ids),
            config.seed,
        )
        self.rewards = RewardGroup(rewards)
        self.turns = Turns(config, groups, self.policy, self.rollout)
        if self.origin.checkpoint is not None:
            self.policy.load(self.origin.checkpoint)

    # -- the loop
    # ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """GRPO (Shao et al. 2024, algorithm 1) over references."""
        run, config = self.run, self.config
        generation = int(self.origin.state.get("generation", 0))
        self.publish(generation)
        if run.step == 0:
            self.evaluate()
        run.timer.finish()
        while run.step < self.schedule.total_steps and not run.stop_requested:
            prompts = self.order.batch(generation).tolist()
            with run.timer.phase("generate"):
                self.prompt_counts["dispatched"] += len(prompts)
                batch = self.sample(self.prompts, prompts, config.num_generations, generation)
                self.prompt_counts["finished"] += len({t.group for t in batch})
            with run.timer.phase("reward"):
                scored = self.rewards.score(batch, self.prompts, TrainerState(run.step, run.total_steps))
                rewards = combine_rewards(scored.values, resolved.reward_weights(config))
                compared = group_advantages(rewards, [t.group for t in batch], config.scale_rewards)
            self.turns.to_policy()
            late = self.late_columns(batch)
            told = report.batch_metrics(batch, scored, rewards, compared)
            self.log_completions(batch, scored, rewards, compared)
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
        """What lies beside the trajectories: the pictures of their prompts, and the log-probs that the loss
        needs beside the policy's own (the reference's, and the old policy's if it will move).
        """
        rows, lengths = [t.data for t in batch], [t.length for t in batch]
        pictures = picture_places(batch)
        late: dict[str, list[Any]] = {**pictures}
        if self.reference is not None:
            with self.run.timer.phase("reference"):
                budget = launch.max_tokens(self.config, self.groups.on_gpu)
                layout = launch.layout(self.config, self.groups.on_gpu, self.prompts.account.vision)
                scored = score_rows(self.reference, rows, lengths, budget, layout, late=pictures)
                late["ref_logprobs"] = scored.columns
        if not self.schedule.batch.on_policy:
            with self.run.timer.phase("train"):
                late["old_logprobs"] = self.policy.logprobs(rows, lengths, pictures).columns
        return late

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
        run, rows = self.run, batch[part]
        weights = row_weights(
            [t.completion_tokens for t in rows], self.config.loss_type, self.config.max_completion_length
        )
        with run.timer.phase("train"):
            step = self.policy.train(
                [t.data for t in rows],
                [t.length for t in rows],
                {"weight": weights, "advantage": compared.advantages[part]},
                {name: column[part] for name, column in late.items()},
                run.step,
            )
        gap = step.metrics.get("rollout_correction/logp_abs_diff_max", 0.0)
        self.max_gap = max(self.max_gap, gap)
        run.record({**step.metrics, **told, **report.step_metrics(run, step, self.schedule.steps_per_epoch)})

    def sample(
        self, prompts: PromptSet, rows: Sequence[int], completions: int, batch: int
    ) -> list[Trajectory]:
        """Completions by the newest weights."""
        if self.turns.to_rollout():
            self.rollout.load(self.version)
        return self.rollout.generate(prompts, rows, completions, self.version, batch)

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
        self.version = version

    def after_generation(self, generation: int, last: bool) -> None:
        """Evaluation and checkpoint, where due. A step that falls inside a generation counts at its end."""
        run, config = self.run, self.config
        per = self.schedule.batch.optimizer_steps_per_generation * config.num_iterations
        if last or run.stop_requested or due(run.step, per, resolved.eval_steps(config)):
            self.evaluate()
        if last or run.stop_requested or due(run.step, per, config.save_steps):
            state = {
                "generation": generation,
                "reward_failures": dict(self.reward_failures),
                "prompt_counts": dict(self.prompt_counts),
                "max_gap": self.max_gap,
            }
            self.turns.to_policy()
            run.save(self.policy, state)

    def evaluate(self) -> None:
        """Rewards of completions of the held-out prompts, sampled as in training."""
        if self.held_out is None:
            return
        config, held_out = self.config, self.held_out
        count = resolved.num_generations_eval(config)
        # The same seeds each time: what changes between evaluations is the policy alone.
        batch = self.sample(held_out, range(len(held_out)), count, EVALUATION)
        scored = self.rewards.score(batch, held_out, TrainerState(self.run.step, self.run.total_steps))
        rewards = combine_rewards(scored.values, resolved.reward_weights(config))
        self.run.record_evaluation(report.evaluation_metrics(batch, scored, rewards))

    def log_completions(
        self,
        batch: Sequence[Trajectory],
        scored: Scored,
        rewards: np.ndarray,
        compared: AdvantageResult,
    ) -> None:
        """Counts what could not be scored and, if asked, writes every completion down."""
        for failure in scored.failures:
            self.reward_failures[f"{failure.function}: {failure.kind}"] += 1
        if self.config.log_completions:
            timeout = self.config.step_timeout
            prompts = fetch(Pending(self.prompts.texts, "the object store", "reading prompts", timeout))
            texts = read_texts(batch, timeout)
            rows = report.completion_rows(self.run.step + 1, batch, prompts, texts, scored, rewards, compared)
            self.completion_log.write(rows)


EVALUATION = 2**31
"""The batch number of evaluations, in the seeds of their completions."""


def due(step: int, window: int, every: int) -> bool:
    """Whether a multiple of `every` lies among the last `window` steps up to `step`."""
    return step // every > max(step - window, 0) // every
