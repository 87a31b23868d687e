"""How many workers of each role, and what each gets: defaults from what the cluster has, overruled by flags.

Pure: configuration and cluster in, group specs out. On a machine without a GPU all groups share the cores and
take turns, so each worker asks Ray for a sliver of a core and uses all the threads of its share while it is
its turn. With GPUs the rollout and reference workers sit beside the policy on every GPU unless they are told
to have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from raytune_rl.config import InferConfig, PreferenceConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import GroupSpec, find_homeless, make_layout

T = TypeVar("T")

REWARD_WORKERS_AT_MOST = 4
SERVED_WITH = 0.3
"""Share of a GPU, in Ray's books, of each group that sits beside the policy, which has the rest; it divides
no memory.
"""
CPU_SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""Cores a worker may be given, in Ray's books: the first that lets all of them in."""


@dataclass(frozen=True)
class Groups:
    """The groups of a run.

    Attributes:
        specs: In order of placement; a group that others share bundles with comes first.
        threads: CPU threads of one worker, by group.
        on_gpu: Whether models live on GPUs.
        colocated: Whether rollout and reference share the policy's GPUs.
    """

    specs: tuple[GroupSpec, ...]
    threads: dict[str, int]
    on_gpu: bool
    colocated: bool

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
    workers = _or(config.policy_workers, _room(cluster, gpus + beside) if on_gpu else 1)
    cpus = config.cpus_per_policy_worker or 0.0
    specs = [GroupSpec("policy", workers, cpus, gpus, None, _reserved_for("policy", cluster))]
    if apart:
        count, cpus = _or(apart.reference_workers, workers), apart.cpus_per_reference_worker or 0.0
        specs.append(GroupSpec("reference", count, cpus, beside, "policy" if on_gpu else None, {}))
    threads = {spec.name: _threads(cluster, spec.workers, on_gpu) for spec in specs}
    return Groups(_with_cpus(specs, cluster), threads, on_gpu, colocated=on_gpu and apart is not None)


def infer_groups(config: InferConfig, cluster: ClusterInfo) -> Groups:
    """The engines that a trained model is tried with."""
    on_gpu = cluster.has_gpus and config.gpus_per_rollout_worker != 0
    gpus = _or(config.gpus_per_rollout_worker, float(config.vllm_tensor_parallel_size) if on_gpu else 0.0)
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


def online_groups(config: RLHFConfig, cluster: ClusterInfo) -> Groups:
    """Policy, rollout, reference (only where there is a KL term) and reward.

    Raises:
        ConfigError: Colocation and tensor parallelism are asked for together, or colocated groups ask for
            more than the GPU that they share.
        PlacementError: Separate groups are asked for on too few GPUs.
    """
    on_gpu = _on_gpu(config, cluster)
    colocated = on_gpu and _or(resolved.colocate(config), not _roles_apart(cluster))
    if not on_gpu:
        models = _on_cpu(config)
    elif colocated:
        models = _sharing(config, cluster)
    else:
        models = _apart(config, cluster)
    reward = _or(config.reward_workers, max(1, min(REWARD_WORKERS_AT_MOST, int(cluster.cpus / 4))))
    specs = [
        GroupSpec(
            name,
            workers,
            getattr(config, f"cpus_per_{name}_worker") or 0.0,
            gpus,
            "policy" if colocated and name in ("rollout", "reference") else None,
            _reserved_for(name, cluster),
        )
        for name, (workers, gpus) in {**models, "reward": (reward, 0.0)}.items()
    ]
    threads = {spec.name: _threads(cluster, spec.workers, on_gpu) for spec in specs} | {"reward": 1}
    return Groups(_with_cpus(specs, cluster), threads, on_gpu, colocated)


# -- how many workers, and GPUs of each ----------------------------------------------------------------------

Counted = dict[str, tuple[int, float]]
"""By group: workers, and GPUs of each."""


def _on_cpu(config: RLHFConfig) -> Counted:
    """One worker of each role: they take turns on the cores."""
    counted = {
        "policy": (_or(config.policy_workers, 1), _or(config.gpus_per_policy_worker, 0.0)),
        "rollout": (_or(config.rollout_workers, 1), _or(config.gpus_per_rollout_worker, 0.0)),
        "reference": (_or(config.reference_workers, 1), _or(config.gpus_per_reference_worker, 0.0)),
    }
    return counted if config.beta > 0 else {k: v for k, v in counted.items() if k != "reference"}


def _sharing(config: RLHFConfig, cluster: ClusterInfo) -> Counted:
    """Rollout and reference beside the policy, on every GPU."""
    if config.vllm_tensor_parallel_size > 1:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {config.vllm_tensor_parallel_size} needs GPUs of its own for each "
            "engine: add --colocate false."
        )
    policy = _or(config.policy_workers, _room(cluster, 1.0))
    given = {
        "rollout": (_or(config.rollout_workers, policy), config.gpus_per_rollout_worker),
        "reference": (_or(config.reference_workers, policy), config.gpus_per_reference_worker),
    }
    if config.beta == 0:
        del given["reference"]
    counted, left = {}, 1.0
    for name, (workers, gpus) in given.items():
        on_one = -(-workers // policy)
        share = _or(gpus, int(SERVED_WITH / on_one * 100) / 100)
        counted[name] = (workers, share)
        left -= on_one * share
    own = _or(config.gpus_per_policy_worker, round(left, 4))
    if own <= 0 or own > left + 1e-6:
        asked = " and ".join(
            f"{-(-workers // policy)} x {share:g} for {n}" for n, (workers, share) in counted.items()
        )
        raise ConfigError(
            f"colocated groups share one GPU, but {asked} leave {max(left, 0.0):g} of it for a policy worker"
            f"{f', which asks for {own:g}' if config.gpus_per_policy_worker else ''}: lower "
            "--gpus_per_policy_worker, --gpus_per_rollout_worker or --gpus_per_reference_worker, or give "
            "each group GPUs of its own with --colocate false."
        )
    return {"policy": (policy, own), **counted}


def _apart(config: RLHFConfig, cluster: ClusterInfo) -> Counted:
    """GPUs of their own for each group: half of them sample, unless the user or the nodes say otherwise."""
    own = _or(config.gpus_per_policy_worker, 1.0)
    engine = _or(config.gpus_per_rollout_worker, float(config.vllm_tensor_parallel_size))
    scorer = _or(config.gpus_per_reference_worker, 1.0)
    scorers = _or(config.reference_workers, max(1, int(cluster.gpus / 8))) if config.beta > 0 else 0
    rest = cluster.gpus - scorers * scorer
    if rest < own + engine:
        also = f" and {scorers} reference worker(s) of {scorer:g}" if scorers else ""
        raise PlacementError(
            f"the groups do not fit: {cluster.gpus:g} GPU(s) cannot hold a policy worker of {own:g}, a "
            f"rollout worker of {engine:g}{also} on GPUs of their own. Use --colocate true, or add GPUs."
        )
    if _roles_apart(cluster):
        policy = _or(config.policy_workers, _room(cluster, own, "policy"))
        engines = _or(config.rollout_workers, _room(cluster, engine, "rollout", beside=scorers * scorer))
    else:
        kept = (config.policy_workers or 0) * own or rest / 2
        engines = _or(config.rollout_workers, max(1, int((rest - kept) / max(engine, 0.01))))
        policy = _or(config.policy_workers, max(1, int((rest - engines * engine) / max(own, 0.01))))
    counted = {"policy": (policy, own), "rollout": (engines, engine)}
    return {**counted, "reference": (scorers, scorer)} if scorers else counted


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
    held = sum(int(have / max(gpus, 0.01) + 1e-9) for have in free)
    return max(1, held - int(-(-beside // max(gpus, 0.01))))


# -- where, and with what ------------------------------------------------------------------------------------


def _with_cpus(specs: Sequence[GroupSpec], cluster: ClusterInfo) -> tuple[GroupSpec, ...]:
    """Gives workers whose cores the user did not set the largest share that lets all of them in."""
    tried = [tuple(replace(spec, cpus=spec.cpus or share) for spec in specs) for share in CPU_SHARES]
    fitting = (specs for specs in tried if find_homeless(make_layout(specs), cluster.nodes) is None)
    return next(fitting, tried[0])


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
