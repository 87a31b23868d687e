"""The groups of an online run: started all at once, waited for together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.groups import lora_sync, specs
from raytune_rl.groups.critic import ActorCritic, Critic
from raytune_rl.groups.fleet import RewardGroup, RolloutGroup
from raytune_rl.groups.gpu_sharing import Turns
from raytune_rl.groups.logprobs import AdapterOff, Reference, ReferenceGroup
from raytune_rl.groups.rewards import RewardModelGroup, Scorer, Together
from raytune_rl.groups.sizes import Groups
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.train import Algorithm
from raytune_rl.rewards.sandbox import memory_limit_bytes
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.weights import start_store
from raytune_rl.workers.policy import PolicyWorker, policy_env
from raytune_rl.workers.reference import ReferenceWorker
from raytune_rl.workers.reward import RewardWorker
from raytune_rl.workers.reward_model import RewardModelWorker
from raytune_rl.workers.rollout import RolloutWorker, rollout_env


@dataclass(frozen=True)
class OnlineGroups:
    """Who does what.

    Attributes:
        policy: Trains.
        rollout: Samples.
        rewards: Scores: reward functions, reward models, or both.
        reference: Gives the log-probs for the KL; None without one.
        turns: Who has the GPUs.
        store: Where published weights are found.
    """

    policy: PolicyGroup
    rollout: RolloutGroup
    rewards: Scorer
    reference: Reference | None
    turns: Turns
    store: Any


def start_groups(
    config: RLHFConfig,
    groups: Groups,
    algorithm: Algorithm,
    prompts: PromptSet,
    *,
    total_steps: int,
    run_name: str,
    slots: Mapping[str, Any],
    max_model_len: int,
    media: dict[str, int] | None,
    stack: ExitStack,
    say: Callable[[str], None],
    lost: Callable[[str, str], None],
) -> OnlineGroups:
    """Starts all actors at once and waits for them.

    Args:
        config: Of the run.
        groups: How many of each, and where.
        algorithm: What the policy trains by.
        prompts: Facts about model and prompts.
        total_steps: Optimizer steps of the run.
        run_name: Names the weight store.
        slots: Reserved places by group.
        max_model_len: Of the engines, tokens.
        media: Most images, videos and audios in one prompt; None for a model that takes texts only.
        stack: Ends the actors.
        say: Tells the user a sentence.
        lost: Told the name of a group that lost a worker and goes on, and a sentence about it.
    """
    account = prompts.account
    store_name = f"weights-{ray.get_runtime_context().get_job_id()}-{run_name}"
    # Every engine has the newest version before the next is made: an older one would only fill the memory.
    store = start_store(store_name, keep=1)
    stack.callback(ray.kill, store)

    def group(name: str, worker: type, make: Any, env: Mapping[str, str]) -> WorkerGroup:
        made = WorkerGroup(groups[name], slots[name], worker, make, env, config.step_timeout)
        stack.callback(made.shutdown)
        return made

    spec = specs.policy_spec(
        config,
        groups,
        total_steps,
        loss=algorithm.loss,
        loss_settings=algorithm.settings,
        temperature=config.temperature,
        dropout=config.lora_dropout,
        publish_mode=lora_sync.publish_mode(config, account.takes_media),
        takes_media=account.takes_media,
        kinds=account.media.kinds,
        banned=account.placeholder_ids,
    )
    spec = replace(
        spec,
        with_entropy=algorithm.with_entropy,
        plugin_files=algorithm.plugin_files,
        untied=lora_sync.unties(config, account.takes_media),
    )
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
        lambda rank: {"spec": specs.engine_spec(config, groups, max_model_len, store_name, rank, media)},
        rollout_env(groups.threads["rollout"], config.vllm_tensor_parallel_size, groups.on_gpu),
    )
    judges: list[WorkerGroup] = []
    scorers: list[Scorer] = []
    if "reward" in groups:
        functions = group(
            "reward",
            RewardWorker,
            lambda _: {
                "names": config.reward_funcs,
                "plugin_files": config.external_plugins,
                "config_dict": config.args(),
                "timeout_s": config.reward_timeout,
                "memory_limit_bytes": memory_limit_bytes(config.reward_memory_limit),
            },
            {"OMP_NUM_THREADS": "1"},
        )
        judges.append(functions)
        scorers.append(RewardGroup(functions))
    if "reward_model" in groups:
        models = group(
            "reward_model",
            RewardModelWorker,
            lambda _: {"spec": specs.reward_model_spec(config, groups)},
            policy_env(groups.threads["reward_model"], groups.on_gpu),
        )
        judges.append(models)
        scorers.append(RewardModelGroup(models))
    reference: WorkerGroup | None = None
    if "reference" in groups:
        reference = group(
            "reference",
            ReferenceWorker,
            lambda _: {"spec": specs.online_reference(config, spec.model), "settings": spec.score},
            policy_env(groups.threads["reference"], groups.on_gpu),
        )
    budget = specs.max_tokens(config, groups.on_gpu)
    trainer: PolicyGroup
    if isinstance(config, PPOConfig):
        estimator = specs.critic_spec(config, groups, total_steps, account.takes_media, account.media.kinds)
        critics = groups["critic"].workers
        critic = group(
            "critic",
            PolicyWorker,
            lambda rank: {"spec": estimator, "rank": rank, "world_size": critics},
            policy_env(groups.threads["critic"], groups.on_gpu),
        )
        second = Critic(critic, estimator, budget, config.start_timeout)
        trainer = ActorCritic(policy, spec, budget, config.start_timeout, second, config.vf_coef)
    else:
        trainer = PolicyGroup(policy, spec, budget, config.start_timeout)
    for started in (*judges, rollout):
        started.call("ping", what="starting", timeout_s=config.start_timeout)
    settled: list[Settled] = []
    if reference is not None:
        settled = reference.call("ping", what="starting", timeout_s=config.start_timeout)
    for notice in trainer.ready().notices:
        say(f"Note: {notice}")
    for notice in settled[0].notices if settled else ():
        say(f"Note: reference: {notice}")
    # A reference that moves is what it is by its past, and the policy is one world: neither can be replaced.
    unmoving = [] if reference is None or config.sync_ref_model else [reference]
    for stateless in (*judges, *unmoving):
        stateless.replace_lost(config.start_timeout, lost)
    rollout.replace_lost(config.start_timeout, lost, {"load_weights": (None,)})
    engines = RolloutGroup(
        rollout,
        specs.sampling(config, account.stop_token_ids, account.placeholder_ids),
        config.seed,
        specs.sampling(config, account.stop_token_ids, account.placeholder_ids, evaluation=True),
        multi_turn=config.multi_turn_scheduler is not None,
    )
    turns = Turns(config, groups, trainer, engines)
    compared: Reference | None = None
    if reference is not None:
        compared = ReferenceGroup(reference, budget, settled[0].layout)
    elif config.beta > 0:
        compared = AdapterOff(trainer)
    return OnlineGroups(trainer, engines, Together(scorers), compared, turns, store)
