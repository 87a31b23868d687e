"""How many workers of each role, and what each gets: defaults from what the cluster has, overruled by flags.

Pure: configuration and cluster in, group specs out. On a machine without a GPU all groups share the cores and
take turns, so each worker asks Ray for a sliver of a core and uses all the threads of its share while it is
its turn. With GPUs the rollout and reference workers sit beside the policy on every GPU unless they are told
to have their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from raytune_rl.config import InferConfig, PreferenceConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.config.base import Options
from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.groups.scaling import Bounds
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import GroupSpec, find_homeless, make_layout, sum_of

T = TypeVar("T")

TEACHER = "teacher"
"""The role of all groups of teachers."""
CORES_PER_REWARD_WORKER, REWARD_WORKERS_AT_MOST = 4, 16
"""A worker compares one to two thousand plain answers a second, hard ones far slower; and on a small
machine it takes turns with the models.
"""
SERVED_WITH = 0.3
"""Share of a GPU, in Ray's books, of each group that sits beside the policy, which has the rest; it divides
no memory.
"""
SERVED_TOGETHER = 0.9
"""The most that they have together."""
CPU_SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""Cores a worker may be given, in Ray's books: the first that lets all of them in."""


@dataclass(frozen=True)
class Groups:
    """The groups of a run.

    Attributes:
        specs: In order of placement; a group that others share bundles with comes first.
        threads: CPU threads of one worker, by group.
        on_gpu: Whether models live on GPUs.
        colocated: Whether the other models share the policy's GPUs.
        elastic: Between which numbers engines come and go, each with a place of its own; the spec then has
            the number at the start. None: they stay.
    """

    specs: tuple[GroupSpec, ...]
    threads: dict[str, int]
    on_gpu: bool
    colocated: bool
    elastic: Bounds | None = None

    @property
    def fixed(self) -> tuple[GroupSpec, ...]:
        """The groups whose places are reserved together, for the whole run."""
        return tuple(spec for spec in self.specs if self.elastic is None or spec.name != "rollout")

    def grown(self) -> tuple[GroupSpec, ...]:
        """All groups, with the most engines that there may be."""
        if self.elastic is None:
            return self.specs
        most = self.elastic.most
        return tuple(replace(s, workers=most) if s.name == "rollout" else s for s in self.specs)

    def __getitem__(self, name: str) -> GroupSpec:
        return next(spec for spec in self.specs if spec.name == name)

    def __contains__(self, name: str) -> bool:
        return any(spec.name == name for spec in self.specs)


def offline_groups(config: SFTConfig | PreferenceConfig, cluster: ClusterInfo) -> Groups:
    """The policy; beside it a reference, where that is another model than the one training starts from."""
    on_gpu = _on_gpu(config, cluster)
    apart = config if isinstance(config, PreferenceConfig) and config.own_reference else None
    beside = _or(apart.gpus_per_reference_worker, SERVED_WITH if on_gpu else 0.0) if apart else 0.0
    gpus = _or(config.gpus_per_policy_worker, 1.0 - beside if on_gpu else 0.0)
    spread = _spread(config, cluster, {"policy": gpus + beside})
    workers = _or(config.policy_workers, spread.get("policy", _room(cluster, gpus + beside) if on_gpu else 1))
    cpus = config.cpus_per_policy_worker or 0.0
    reserved, per_node = _reserved_for("policy", cluster), config.policy_workers_per_node
    specs = [GroupSpec("policy", workers, cpus, gpus, None, reserved, per_node)]
    if apart:
        count, cpus = _or(apart.reference_workers, workers), apart.cpus_per_reference_worker or 0.0
        specs.append(GroupSpec("reference", count, cpus, beside, "policy" if on_gpu else None, {}))
    threads = {spec.name: _threads(cluster, spec.workers, on_gpu) for spec in specs}
    return Groups(_with_cpus(specs, cluster), threads, on_gpu, colocated=on_gpu and apart is not None)


def infer_groups(config: InferConfig, cluster: ClusterInfo) -> Groups:
    """The engines that a trained model is tried with."""
    on_gpu = cluster.has_gpus and config.gpus_per_rollout_worker != 0
    gpus = _gpus_of_an_engine(config) if on_gpu else config.gpus_per_rollout_worker or 0.0
    many = _room(cluster, gpus) if on_gpu and config.val_dataset else 1
    workers = _or(config.rollout_workers, many)
    spec = GroupSpec(
        "rollout",
        workers,
        config.cpus_per_rollout_worker or 0.0,
        gpus,
        None,
        _reserved_for("rollout", cluster),
    )
    threads = {"rollout": _threads(cluster, workers, on_gpu)}
    return Groups(_with_cpus([spec], cluster), threads, on_gpu, colocated=False)


def online_groups(config: RLHFConfig, cluster: ClusterInfo, needs: Collection[str]) -> Groups:
    """Policy, rollout, reference (where it is a model of its own), critic, reward, reward model, teachers.

    Args:
        config: Of the run.
        cluster: The nodes.
        needs: Columns that loss and credit need: "ref_logprobs" wants a reference, "values" a critic.

    Raises:
        ConfigError: Colocation and tensor parallelism are asked for together, or colocated groups ask for
            more than the GPU that they share.
        PlacementError: Separate groups are asked for on too few GPUs.
    """
    on_gpu = _on_gpu(config, cluster)
    elastic = _elastic(config)
    shared = _or(resolved.colocate(config), not _roles_apart(cluster) and elastic is None)
    colocated = on_gpu and shared
    if not on_gpu:
        models = _on_cpu(config, cluster, _beside(config, needs))
    elif colocated:
        models = _sharing(config, cluster, _beside(config, needs))
    else:
        models = _apart(config, cluster, _beside(config, needs))
    reward = _or(
        config.reward_workers,
        max(1, min(REWARD_WORKERS_AT_MOST, int(cluster.cpus / CORES_PER_REWARD_WORKER))),
    )
    functions = {"reward": (reward, 0.0)} if config.reward_funcs else {}
    specs = [
        GroupSpec(
            name,
            workers,
            getattr(config, f"cpus_per_{_role(name)}_worker") or 0.0,
            gpus,
            "policy" if colocated and name not in ("policy", "reward") else None,
            _reserved_for(name, cluster),
            _per_node(config, name) if name == "policy" or not colocated else None,
        )
        for name, (workers, gpus) in {**models, **functions}.items()
    ]
    groups = Groups(tuple(specs), {}, on_gpu, colocated, elastic)
    threads = {spec.name: _threads(cluster, spec.workers, on_gpu) for spec in groups.grown()} | {"reward": 1}
    return replace(groups, specs=_with_cpus(specs, cluster, groups.grown()), threads=threads)


def _elastic(config: RLHFConfig) -> Bounds | None:
    """Between which numbers engines come and go, where they do."""
    asked = resolved.engines(config)
    return Bounds(*asked) if asked is not None and resolved.elastic(config) else None


# -- how many workers, and GPUs of each ----------------------------------------------------------------------

Counted = dict[str, tuple[int, float]]
"""By group: workers, and GPUs of each."""


def _beside(config: RLHFConfig, needs: Collection[str]) -> list[str]:
    """Groups that hold a model, beside policy and rollout."""
    wanted = {
        "reference": config.own_reference and "ref_logprobs" in needs,
        "critic": "values" in needs,
        "reward_model": bool(config.reward_model),
    }
    return [*(name for name, is_wanted in wanted.items() if is_wanted), *teacher_groups(config)]


def teacher_groups(config: RLHFConfig) -> list[str]:
    """A group for each teacher, in the order of `--teacher_model`."""
    if not config.has_teachers:
        return []
    count = max(len(config.teacher_model), 1)
    return [TEACHER] if count == 1 else [f"{TEACHER}_{number}" for number in range(count)]


def _role(name: str) -> str:
    """The role by whose name the flags of a group's size go."""
    return TEACHER if name.startswith(TEACHER) else name


def _asked(config: RLHFConfig, name: str) -> tuple[int | None, float | None]:
    """Workers of a group at the start, and GPUs of each, as the user says."""
    role = _role(name)
    workers = resolved.engines_at_start(config) if role == "rollout" else getattr(config, f"{role}_workers")
    return workers, getattr(config, f"gpus_per_{role}_worker")


def _per_node(config: Options, name: str) -> int | None:
    """Workers of a group on each node, where the user says."""
    return getattr(config, f"{name}_workers_per_node", None)


def _spread(config: Options, cluster: ClusterInfo, gpus: Mapping[str, float]) -> dict[str, int]:
    """Workers of the groups that are so many a node, on all nodes that have room for them; at least on one.

    Args:
        config: Says how many a node.
        cluster: The nodes.
        gpus: GPUs of one worker, by group.
    """
    needs = {
        name: {"GPU": each * gpus[name], **{role: float(each) for role in _reserved_for(name, cluster)}}
        for name in gpus
        if (each := _per_node(config, name)) is not None
    }
    if not _roles_apart(cluster):  # they stand on the same nodes
        needs = dict.fromkeys(needs, sum_of(needs.values()))
    working = [have for have in cluster.nodes.values() if have.get("CPU", 0.0) > 0]
    able = {
        name: sum(
            all(have.get(what, 0.0) + 1e-9 >= amount for what, amount in need.items()) for have in working
        )
        for name, need in needs.items()
    }
    return {name: max(1, nodes) * (_per_node(config, name) or 1) for name, nodes in able.items()}


def _on_cpu(config: RLHFConfig, cluster: ClusterInfo, beside: Sequence[str]) -> Counted:
    """One worker of each role: they take turns on the cores."""
    requested = {name: _asked(config, name) for name in ("policy", "rollout", *beside)}
    spread = _spread(config, cluster, {name: _or(gpus, 0.0) for name, (_, gpus) in requested.items()})
    return {
        name: (_or(workers, spread.get(name, 1)), _or(gpus, 0.0))
        for name, (workers, gpus) in requested.items()
    }


def _sharing(config: RLHFConfig, cluster: ClusterInfo, beside: Sequence[str]) -> Counted:
    """All other models beside the policy, on every GPU."""
    if config.vllm_tensor_parallel_size > 1:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {config.vllm_tensor_parallel_size} needs GPUs of its own for each "
            "engine, since Ray gives no worker parts of several: add --colocate false."
        )
    spread = _spread(config, cluster, {"policy": 1.0})
    policy = _or(config.policy_workers, spread.get("policy", _room(cluster, 1.0)))
    engines = _engines_beside(config, policy)
    names = ["rollout", *beside]
    served_with = min(SERVED_WITH, SERVED_TOGETHER / len(names))
    counted, left = {}, 1.0
    for name in names:
        workers_wanted, gpus = _asked(config, name)
        workers = _or(engines if name == "rollout" else workers_wanted, policy)
        on_one = -(-workers // policy)
        share = _or(gpus, int(served_with / on_one * 100) / 100)
        counted[name] = (workers, share)
        left -= on_one * share
    own = _or(config.gpus_per_policy_worker, round(left, 4))
    if own <= 0 or own > left + 1e-6:
        asks = " and ".join(
            f"{-(-workers // policy)} x {share:g} for {n}" for n, (workers, share) in counted.items()
        )
        flags = list(dict.fromkeys(f"--gpus_per_{_role(name)}_worker" for name in ("policy", *names)))
        raise ConfigError(
            f"colocated groups share one GPU, but {asks} leave {max(left, 0.0):g} of it for a policy worker"
            f"{f', which asks for {own:g}' if config.gpus_per_policy_worker else ''}: lower "
            f"{', '.join(flags[:-1])} or {flags[-1]}, or give each group GPUs of its own with "
            "--colocate false."
        )
    return {"policy": (policy, own), **counted}


def _engines_beside(config: RLHFConfig, policy: int) -> int | None:
    """Engines that sit beside so many policy workers, as the user says.

    Raises:
        ConfigError: So many a node, where the policy's workers do not make it so.
    """
    each, ranks = config.rollout_workers_per_node, config.policy_workers_per_node
    if each is None:
        return resolved.engines_at_start(config)
    engines = each * policy // ranks if ranks else 0
    if ranks is None or each % ranks or resolved.engines_at_start(config) not in (None, engines):
        raise ConfigError(
            f"--rollout_workers_per_node {each}: engines that share the policy's GPUs sit beside its ranks, "
            "so they are as many on a node as --policy_workers_per_node, or a multiple, and on the same "
            "nodes. Set that to match, or give the engines GPUs of their own with --colocate false."
        )
    return engines


def _apart(config: RLHFConfig, cluster: ClusterInfo, beside: Sequence[str]) -> Counted:
    """GPUs of their own for each group: half of them sample, unless the user or the nodes say otherwise.

    A critic is as large as the policy and trains as much: it has as many workers, unless the user says.
    """
    own = _or(config.gpus_per_policy_worker, 1.0)
    engine = _gpus_of_an_engine(config)
    scorers: Counted = {}
    paired: dict[str, float] = {}
    for name in beside:
        workers_wanted, gpus = _asked(config, name)
        if name == "critic" and workers_wanted is None:
            paired[name] = _or(gpus, 1.0)
        else:
            scorers[name] = (_or(workers_wanted, max(1, int(cluster.gpus / 8))), _or(gpus, 1.0))
    pair = own + sum(paired.values())
    scorer_gpus = sum(workers * gpus for workers, gpus in scorers.values())
    rest = cluster.gpus - scorer_gpus
    if rest < pair + engine:
        named = [f"{workers} {name} worker(s) of {gpus:g}" for name, (workers, gpus) in scorers.items()]
        named += [f"a {name} worker of {gpus:g}" for name, gpus in paired.items()]
        also = f" and {', '.join(named)}" if named else ""
        raise PlacementError(
            f"the groups do not fit: {cluster.gpus:g} GPU(s) cannot hold a policy worker of {own:g}, a "
            f"rollout worker of {engine:g}{also} on GPUs of their own. Use --colocate true, or add GPUs."
        )
    spread = _spread(config, cluster, {"policy": own, "rollout": engine})
    ranks = _or(config.policy_workers, spread.get("policy"))
    samplers = _or(resolved.engines_at_start(config), spread.get("rollout"))
    if ranks is None and resolved.elastic(config) and not _roles_apart(cluster):
        raise ConfigError(
            f"--rollout_workers {config.rollout_workers}: engines grow into the GPUs that nobody trains on: "
            "say with --policy_workers how many do."
        )
    if _roles_apart(cluster):
        policy = _or(ranks, _room(cluster, pair, "policy"))
        engines = _or(samplers, _room(cluster, engine, "rollout", beside=scorer_gpus))
    else:
        kept = (ranks or 0) * pair or rest / 2
        engines = _or(samplers, max(1, int((rest - kept) / max(engine, 0.01))))
        policy = _or(ranks, max(1, int((rest - engines * engine) / max(pair, 0.01))))
    beside_policy = {name: (policy, gpus) for name, gpus in paired.items()}
    return {"policy": (policy, own), "rollout": (engines, engine), **beside_policy, **scorers}


def _gpus_of_an_engine(config: RLHFConfig | InferConfig) -> float:
    """GPUs of a rollout worker that has its own.

    Raises:
        ConfigError: Fewer than its model is spread over.
    """
    parts, gpus = config.vllm_tensor_parallel_size, config.gpus_per_rollout_worker
    if gpus is not None and gpus < parts > 1:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {parts} needs {parts} GPUs for each engine, but "
            f"--gpus_per_rollout_worker is {gpus:g}: leave that out."
        )
    return _or(gpus, float(parts))


def _room(cluster: ClusterInfo, gpus: float, role: str | None = None, beside: float = 0.0) -> int:
    """Workers of so many GPUs that the nodes (of a role) hold, at least one.

    Args:
        cluster: The nodes.
        gpus: GPUs of one worker.
        role: Count only nodes that declare it.
        beside: GPUs to leave free on them.
    """
    nodes = [have for have in cluster.nodes.values() if role is None or role in have]
    free = [have.get("GPU", 0.0) for have in nodes]
    places = sum(int(have / max(gpus, 0.01) + 1e-9) for have in free)
    return max(1, places - int(-(-beside // max(gpus, 0.01))))


# -- where, and with what ------------------------------------------------------------------------------------


def _with_cpus(
    specs: Sequence[GroupSpec], cluster: ClusterInfo, grown: Sequence[GroupSpec] | None = None
) -> tuple[GroupSpec, ...]:
    """Gives workers whose cores the user did not set the largest share that lets all of them in; the smallest
    where none does, so that the refusal names what is really short.

    Args:
        specs: The groups.
        cluster: The nodes.
        grown: The groups at their largest, which count where nodes have room for that.
    """
    for wanted in (grown or specs, specs):
        for share in CPU_SHARES:
            if find_homeless(make_layout(_each(wanted, share)), cluster.nodes) is None:
                return _each(specs, share)
    return _each(specs, CPU_SHARES[-1])


def _each(specs: Sequence[GroupSpec], share: float) -> tuple[GroupSpec, ...]:
    return tuple(replace(spec, cpus=spec.cpus or share) for spec in specs)


def _reserved_for(role: str, cluster: ClusterInfo) -> dict[str, float]:
    """Where nodes declare a Ray resource by the name of a role, that role's workers are placed only there."""
    return {role: 1.0} if any(role in resources for resources in cluster.nodes.values()) else {}


def _roles_apart(cluster: ClusterInfo) -> bool:
    """Whether the nodes that are reserved for rollout are others than the policy's."""
    declared = [{"policy", "rollout"} & have.keys() for have in cluster.nodes.values()]
    return {"policy"} in declared and {"rollout"} in declared


def _on_gpu(config: SFTConfig | PreferenceConfig | RLHFConfig, cluster: ClusterInfo) -> bool:
    """A cluster whose GPUs are all taken is no reason to train on its CPUs unasked: that ends in a
    PlacementError.
    """
    return cluster.has_gpus and config.gpus_per_policy_worker != 0


def _threads(cluster: ClusterInfo, workers: int, on_gpu: bool) -> int:
    """Threads of one worker of a role: its share of a node's cores, as the roles take turns."""
    nodes = max(len(cluster.nodes), 1)
    per_node = max(cluster.cpus / nodes, 1.0)
    workers_per_node = max(1, -(-workers // nodes))
    limit = 8 if on_gpu else 64
    return max(1, min(limit, int(per_node // workers_per_node)))


def _or(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given
