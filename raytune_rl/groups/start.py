"""The groups of an online run: started, and waited for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import ray

from raytune_rl.config import PPOConfig, RLHFConfig, resolved
from raytune_rl.groups import lora_sync, specs, teacher_specs
from raytune_rl.groups.critic import CriticGroup
from raytune_rl.groups.fleet import RewardGroup, RolloutFleet
from raytune_rl.groups.fleet_start import Growth, hang_limits, start_fleet
from raytune_rl.groups.gpu_sharing import GPUSharing
from raytune_rl.groups.learners import Learner, Learners
from raytune_rl.groups.logprobs import AdapterOff, Follower, Reference, ReferenceGroup
from raytune_rl.groups.restarts import RecoveryRules
from raytune_rl.groups.rewards import NoRewards, RewardModelGroup, Scorer, Together
from raytune_rl.groups.scaling import Patience
from raytune_rl.groups.sizes import Groups, teacher_groups
from raytune_rl.groups.start_order import Part, start_in_turn, turns_of
from raytune_rl.groups.teachers import Teacher, Teachers
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.weight_store import WeightStore
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.model import ModelSpec, Settled
from raytune_rl.protocol.train import LossSpec, TrainerSpec
from raytune_rl.rewards.sandbox import memory_limit_bytes
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import fetch_all
from raytune_rl.workers.reference import ReferenceWorker
from raytune_rl.workers.reward import RewardWorker
from raytune_rl.workers.reward_model import RewardModelWorker
from raytune_rl.workers.rollout import RolloutWorker, rollout_env
from raytune_rl.workers.teacher import ServedTeacherWorker, TeacherWorker
from raytune_rl.workers.trainer import TrainerWorker, trainer_env

CRITIC = "critic"
"""Folder of the critic in a checkpoint; Transformers loads it as a sequence classifier of one label."""
CRITIC_METRICS = {
    "loss": "loss/value_avg",
    "grad_norm": "critic/grad_norm",
    "value": "critic/value",
    "learning_rate": "critic/learning_rate",
}


class Samplers(Protocol):
    """Who samples and scores."""

    @property
    def rollout(self) -> RolloutFleet:
        """Samples."""
        ...

    @property
    def rewards(self) -> Scorer:
        """Scores: reward functions, reward models, or both."""
        ...

    @property
    def gpu_sharing(self) -> GPUSharing:
        """Who has the GPUs."""
        ...


@dataclass(frozen=True)
class OnlineGroups:
    """Who does what.

    Attributes:
        sizes: How many of each, and where.
        policy: Scores and publishes.
        learners: Everything that trains: the policy, and the critic where there is one.
        rollout, rewards, gpu_sharing: See `Samplers`.
        reference: Gives the log-probs for the KL; None without one.
        critic: Says what tokens are worth; None without one.
        store: Where published weights are found.
        teachers: Add their opinion to the advantages; None without any.
        followers: Reference and teacher, where they follow the policy.
    """

    sizes: Groups
    policy: PolicyGroup
    learners: Learners
    rollout: RolloutFleet
    rewards: Scorer
    gpu_sharing: GPUSharing
    reference: Reference | None
    critic: CriticGroup | None
    store: WeightStore
    teachers: Teachers | None = None
    followers: Sequence[Follower] = ()


@dataclass(frozen=True)
class OnlineSetup:
    """The settings that the groups of an online run are started with.

    Attributes:
        config: Of the run.
        sizes: How many of each, and where.
        loss: What the policy trains by.
        needs: Columns that loss and credit need.
        prompts: Facts about model and prompts.
        total_steps: Optimizer steps of the run.
        run_name: Names the weight store.
        max_model_len: Of the engines, tokens.
        media: Most images, videos and audios in one prompt; None for a model that takes texts only.
        longest_taught: The longest row that teachers may see, tokens.
    """

    config: RLHFConfig
    sizes: Groups
    loss: LossSpec
    needs: Collection[str]
    prompts: PromptSet
    total_steps: int
    run_name: str
    max_model_len: int
    media: dict[str, int] | None
    longest_taught: int

    @property
    def store_name(self) -> str:
        """The weight store's, of its own for every run of a cluster."""
        return f"weights-{ray.get_runtime_context().get_job_id()}-{self.run_name}"

    @property
    def policy(self) -> TrainerSpec:
        """The settings of a policy rank."""
        config, account = self.config, self.prompts.account
        spec = specs.policy_spec(
            config,
            self.sizes,
            self.total_steps,
            loss=self.loss.name,
            loss_settings=self.loss.settings,
            temperature=config.temperature,
            dropout=config.lora_dropout,
            publish_mode=lora_sync.publish_mode(config, account.takes_media),
            takes_media=account.takes_media,
            modalities=account.media.modalities,
            disallowed_token_ids=account.placeholder_ids,
        )
        return replace(
            spec,
            with_entropy=self.loss.with_entropy,
            plugin_files=self.loss.plugin_files,
            untied=lora_sync.unties(config, account.takes_media),
        )


class Starter:
    """Starts workers on their reserved places.

    Args:
        setup: Of the run.
        slots: Reserved places by group.
        stack: Ends the actors.
        rules: How the loss of a rank is treated.
        lost: Told where a worker without a state of its own is lost: from its start on another takes its
            place.
    """

    def __init__(
        self,
        setup: OnlineSetup,
        slots: Mapping[str, Any],
        stack: ExitStack,
        rules: RecoveryRules,
        lost: Callable[[str, str], None],
    ) -> None:
        self._setup, self._slots, self._stack, self._rules = setup, slots, stack, rules
        self._lost = lost

    def group(self, name: str, worker: type, make: Any, env: Mapping[str, str]) -> WorkerGroup:
        """The workers of one role; `make` gives the arguments of the worker of a rank."""
        setup = self._setup
        started = WorkerGroup(
            setup.sizes[name],
            self._slots[name],
            worker,
            make,
            env,
            setup.config.step_timeout,
            at_once=worker is TrainerWorker,  # they meet; the others as `start_order` says
        )
        self._stack.callback(started.shutdown)
        if worker is not TrainerWorker:  # worlds see to their own
            started.replace_lost(setup.config.start_timeout, self._lost)
        return started

    def _models(self, name: str, worker: type, make: Any) -> WorkerGroup:
        sizes = self._setup.sizes
        return self.group(name, worker, make, trainer_env(sizes.threads[name], sizes.on_gpu))

    def world(self, name: str, spec: TrainerSpec) -> TrainerWorld:
        """Ranks that train."""
        config, sizes = self._setup.config, self._setup.sizes
        ranks = sizes[name].workers
        workers = self._models(
            name, TrainerWorker, lambda rank: {"spec": spec, "rank": rank, "world_size": ranks}
        )
        budget = specs.max_tokens(config, sizes.on_gpu)
        return TrainerWorld(workers, spec, budget, config.start_timeout, self._rules)

    def rollout(self) -> WorkerGroup:
        """The engines."""
        setup = self._setup
        config, sizes = setup.config, setup.sizes
        env = rollout_env(
            sizes.threads["rollout"], config.vllm_tensor_parallel_size, sizes.on_gpu, config.start_timeout
        )
        return self.group(
            "rollout",
            RolloutWorker,
            lambda rank: {
                "spec": specs.engine_spec(
                    config, sizes, setup.max_model_len, setup.store_name, rank, setup.media
                )
            },
            env,
        )

    def reward_functions(self) -> WorkerGroup:
        """Workers that run the user's reward functions."""
        config = self._setup.config
        return self.group(
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

    def reward_models(self) -> WorkerGroup:
        """Workers that hold the reward models."""
        setup = self._setup
        spec = specs.reward_model_spec(setup.config, setup.sizes)
        return self._models("reward_model", RewardModelWorker, lambda _: {"spec": spec})

    def reference(self, policy: TrainerSpec) -> WorkerGroup:
        """Copies of the model that the KL refers to."""
        spec = specs.online_reference(self._setup.config, policy.model)
        return self._models("reference", ReferenceWorker, lambda _: {"spec": spec, "settings": policy.score})

    def teacher(self, name: str, spec: ModelSpec, policy: TrainerSpec) -> WorkerGroup:
        """Copies of one teacher."""
        setup, sizes = self._setup, self._setup.sizes
        if setup.config.teacher_backend == "vllm":
            served = teacher_specs.served(setup.config, sizes, name, spec.path, setup.longest_taught)
            env = rollout_env(
                sizes.threads[name], served.tensor_parallel_size, sizes.on_gpu, setup.config.start_timeout
            )
            given = {"spec": served, "settings": policy.score}
            return self.group(name, ServedTeacherWorker, lambda _: given, env)
        return self._models(name, TeacherWorker, lambda _: {"spec": spec, "settings": policy.score})

    def critic(self) -> TrainerWorld:
        """The critic's ranks."""
        setup = self._setup
        account = setup.prompts.account
        # Only a config with a critic's settings gives a credit that needs one.
        config = cast(PPOConfig, setup.config)
        spec = specs.critic_spec(
            config, setup.sizes, setup.total_steps, account.takes_media, account.media.modalities
        )
        return self.world("critic", spec)


class Starting:
    """The groups as they start, one part after the other; see `start_order`."""

    def __init__(
        self, starter: Starter, policy: TrainerSpec, teachers: Mapping[str, ModelSpec], timeout_s: float
    ) -> None:
        self.workers: dict[str, WorkerGroup] = {}
        self.worlds: dict[str, TrainerWorld] = {}
        self._make_workers: dict[str, Callable[[], WorkerGroup]] = {
            "rollout": starter.rollout,
            "reward": starter.reward_functions,
            "reward_model": starter.reward_models,
            "reference": lambda: starter.reference(policy),
            **{name: partial(starter.teacher, name, spec, policy) for name, spec in teachers.items()},
        }
        self._make_worlds: dict[str, Callable[[], TrainerWorld]] = {
            "policy": lambda: starter.world("policy", policy),
            "critic": starter.critic,
        }
        self._timeout_s = timeout_s

    def begin(self, part: Part) -> None:
        """Starts workers; of a group that trains all, as its ranks meet."""
        if part.group in self._make_worlds:
            self.worlds[part.group] = self._make_worlds[part.group]()
            return
        if part.group not in self.workers:
            self.workers[part.group] = self._make_workers[part.group]()
        self.workers[part.group].start(part.ranks)

    def wait(self, part: Part) -> None:
        """Waits until they have loaded."""
        if part.group in self.worlds:
            self.worlds[part.group].ready()
        else:
            self._call(part, "ping", "starting")

    def sleep(self, part: Part) -> None:
        """Makes engines give their memory back."""
        self._call(part, "sleep", "sleeping")

    def _call(self, part: Part, method: str, what: str) -> None:
        group = self.workers[part.group]
        fetch_all([group.submit(r, method, what=what, timeout_s=self._timeout_s) for r in part.ranks])


def start_groups(
    setup: OnlineSetup,
    slots: Mapping[str, Any],
    stack: ExitStack,
    rules: RecoveryRules,
    lost: Callable[[str, str], None],
) -> OnlineGroups:
    """Starts all actors, at once unless they share GPUs, and waits for them.

    Args:
        setup: Of the run.
        slots: Reserved places by group.
        stack: Ends the actors.
        rules: How the loss of a rank is treated.
        lost: Told the name of a group that lost a worker and goes on, and a sentence about it.
    """
    config, sizes, account = setup.config, setup.sizes, setup.prompts.account
    # Every engine has the newest version before the next is made: an older one would only fill the memory.
    # One that is at an older version has its arrays until it has read them, and then pulls the newest.
    store = WeightStore(setup.store_name, 1, config.start_timeout, rules)
    stack.callback(store.end)
    starter, spec, say = Starter(setup, slots, stack, rules, lost), setup.policy, rules.say
    taught_by = dict(zip(teacher_groups(config), teacher_specs.loaded(config, spec.model), strict=True))
    starting = Starting(starter, spec, taught_by, config.start_timeout)
    start_in_turn(turns_of(sizes), starting, sleeps=specs.sleep_level(config, sizes) > 0)
    rollout, ranks = starting.workers["rollout"], starting.worlds["policy"]
    functions, models = starting.workers.get("reward"), starting.workers.get("reward_model")
    reference, critics = starting.workers.get("reference"), starting.worlds.get("critic")
    teachers = [starting.workers[name] for name in teacher_groups(config)]
    judges = [group for group in (functions, models) if group is not None]
    for started in (*judges, rollout):
        started.call("ping", what="starting", timeout_s=config.start_timeout)
    for judge in judges:
        judge.replace_hung(config.hang_timeout)
    rollout.leave_lost()  # from here on the fleet sees to them
    settled: list[Settled] = []
    if reference is not None:
        settled = reference.call("ping", what="starting", timeout_s=config.start_timeout)
        reference.replace_hung(config.hang_timeout)
    policy = PolicyGroup(ranks, config.weight_delta and spec.publish_mode != "adapter")
    for notice in policy.ready().notices:
        say(f"Note: {notice}")
    if critics is not None:
        for notice in critics.ready().notices:
            say(f"Note: critic: {notice}")
    for notice in settled[0].notices if settled else ():
        say(f"Note: reference: {notice}")
    layouts: list[Settled] = []
    for group in teachers:
        ready: list[Settled] = group.call("ping", what="starting", timeout_s=config.start_timeout)
        group.replace_hung(config.hang_timeout)
        layouts.append(ready[0])
        for notice in ready[0].notices:
            say(f"Note: {group.name}: {notice}")
    fleet = start_fleet(
        rollout,
        hang_limits(config, sizes.on_gpu),
        partial(lost, rollout.name),
        stack,
        growth_of(setup, slots, say),
    )
    engines = RolloutFleet(
        rollout,
        fleet,
        specs.sampling(config, account.stop_token_ids, account.placeholder_ids),
        config.seed,
        specs.sampling(config, account.stop_token_ids, account.placeholder_ids, evaluation=True),
        multi_turn=config.multi_turn_scheduler is not None,
        timeout_s=config.step_timeout,
    )
    scorers: list[Scorer] = [] if functions is None else [RewardGroup(functions)]
    reward_models = None if models is None else RewardModelGroup(models)
    scorers += [] if reward_models is None else [reward_models]
    scorers = scorers or [NoRewards()]
    own_reference: ReferenceGroup | None = None
    if reference is not None:
        own_reference = ReferenceGroup(reference, ranks.max_tokens, settled[0])
    reference_scorer: Reference | None = own_reference
    if reference is None and "ref_logprobs" in setup.needs:
        reference_scorer = AdapterOff(policy)
    advisers = [
        Teacher(group, coefficient, layout)
        for group, coefficient, layout in zip(teachers, teacher_coefficients(config), layouts, strict=True)
    ]
    taught = Teachers(advisers, ranks.max_tokens) if advisers else None
    frozen = [group for group in (own_reference, taught) if group is not None]
    moving: list[tuple[WorkerGroup, int, float]] = []
    if reference is not None and config.sync_ref_model:
        moving.append((reference, config.ref_model_sync_steps, config.ref_model_mixup_alpha))
    if config.teacher_sync_steps is not None:
        moving += [(group, config.teacher_sync_steps, config.teacher_mixup_alpha) for group in teachers]
    learners = learners_of(ranks, critics, config, in_turn=sizes.on_gpu and sizes.colocated)
    return OnlineGroups(
        sizes,
        policy,
        learners,
        engines,
        Together(scorers),
        GPUSharing(config, sizes, learners, engines, frozen, reward_models),
        reference_scorer,
        None if critics is None else CriticGroup(critics),
        store,
        taught,
        tuple(Follower(g.name, g, every, share, config.start_timeout, lost) for g, every, share in moving),
    )


def growth_of(setup: OnlineSetup, slots: Mapping[str, Any], say: Callable[[str], None]) -> Growth | None:
    """How engines come and go, if they do."""
    config, bounds = setup.config, setup.sizes.elastic
    if bounds is None:
        return None
    patience = Patience(resolved.rollout_grow_after(config), resolved.rollout_shrink_after(config))
    return Growth(
        replace(setup.sizes["rollout"], workers=1),
        bounds,
        patience,
        slots["rollout"],
        lambda sentence: say(f"Note: {sentence}"),
    )


def teacher_coefficients(config: RLHFConfig) -> list[float]:
    """The weight of each teacher's part of an advantage, in the order of `--teacher_model`."""
    count = len(teacher_groups(config))
    if config.teacher_column is not None:
        return [config.teacher_kl_coef] * count
    weights = config.teacher_weights or (1.0,) * count
    return [config.teacher_kl_coef * weight / sum(weights) for weight in weights]


def learners_of(
    policy: TrainerWorld, critic: TrainerWorld | None, config: RLHFConfig, in_turn: bool = False
) -> Learners:
    """Whoever trains, the policy last; `in_turn` as in `Learners`."""
    if critic is None:
        return Learners([Learner(policy)])
    return Learners(
        [
            Learner(
                critic,
                takes=frozenset({"old_values", "returns"}),
                scalars=frozenset({"weight"}),
                weight=cast(PPOConfig, config).vf_coef,
                folder=CRITIC,
                metric_names=CRITIC_METRICS,
            ),
            Learner(policy),
        ],
        in_turn,
    )
