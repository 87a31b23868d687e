"""How many workers of each role, and what each gets: defaults from what the cluster has, overruled by flags.

Pure: configuration and cluster in, group specs out. On a machine without a GPU all groups share the cores and
take turns, so each worker asks Ray for a sliver of a core and uses all the threads of its share while it is
its turn. With GPUs the rollout and reference workers sit beside the policy on every GPU unless they are told
to have their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from raytune_rl.config import RLHFConfig, SFTConfig, resolved
from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import GroupSpec

T = TypeVar("T")

REWARD_WORKERS_AT_MOST = 4
SERVED_WITH = 0.3
"""Share of a GPU, in Ray's books, of each group that sits beside the policy, which has the rest; it divides
no memory.
"""


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


def sft_groups(config: SFTConfig, cluster: ClusterInfo) -> Groups:
    """The one group of supervised fine-tuning."""
    on_gpu = _on_gpu(config, cluster)
    gpus = _or(config.gpus_per_policy_worker, 1.0 if on_gpu else 0.0)
    workers = _or(config.policy_workers, _whole(cluster.gpus / gpus) if on_gpu else 1)
    cpus = _or(config.cpus_per_policy_worker, _cpu_share(cluster, workers, on_gpu))
    spec = GroupSpec("policy", workers, cpus, gpus, resources=_reserved_for("policy", cluster))
    return Groups((spec,), {"policy": _threads(cluster, workers, on_gpu)}, on_gpu, colocated=False)


def online_groups(config: RLHFConfig, cluster: ClusterInfo) -> Groups:
    """Policy, rollout, reference (only where there is a KL term) and reward.

    Raises:
        ConfigError: Colocation and tensor parallelism are asked for together.
        PlacementError: Separate groups are asked for on too few GPUs.
    """
    on_gpu = _on_gpu(config, cluster)
    colocated = on_gpu and resolved.colocate(config) is not False
    tensor_parallel = config.vllm_tensor_parallel_size
    if colocated and tensor_parallel > 1:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {tensor_parallel} needs GPUs of its own for each engine: add "
            "--colocate false."
        )
    with_reference = config.beta > 0
    sharing = 1 + (1 if with_reference else 0) if colocated else 0
    policy_gpus = _or(
        config.gpus_per_policy_worker, _gpu(on_gpu, 1 - SERVED_WITH * sharing if colocated else 1.0)
    )
    served_gpus = _gpu(on_gpu, SERVED_WITH if colocated else float(tensor_parallel))
    rollout_gpus = _or(config.gpus_per_rollout_worker, served_gpus)
    reference_gpus = _or(config.gpus_per_reference_worker, _gpu(on_gpu, SERVED_WITH if colocated else 1.0))

    policy, rollout, reference = _counts(config, cluster, on_gpu, colocated, with_reference, tensor_parallel)
    reward = _or(config.reward_workers, max(1, min(REWARD_WORKERS_AT_MOST, _whole(cluster.cpus / 4))))
    everybody = policy + rollout + reference + reward
    share = _cpu_share(cluster, everybody, on_gpu)
    host = "policy" if colocated else None
    specs = [
        GroupSpec("policy", policy, _or(config.cpus_per_policy_worker, share), policy_gpus),
        GroupSpec("rollout", rollout, _or(config.cpus_per_rollout_worker, share), rollout_gpus, host),
    ]
    if with_reference:
        cpus = _or(config.cpus_per_reference_worker, share)
        specs.append(GroupSpec("reference", reference, cpus, reference_gpus, host))
    specs.append(GroupSpec("reward", reward, _or(config.cpus_per_reward_worker, share)))
    specs = [replace(spec, resources=_reserved_for(spec.name, cluster)) for spec in specs]
    threads = {spec.name: _threads(cluster, spec.workers, on_gpu) for spec in specs} | {"reward": 1}
    return Groups(tuple(specs), threads, on_gpu, colocated)


def _counts(
    config: RLHFConfig,
    cluster: ClusterInfo,
    on_gpu: bool,
    colocated: bool,
    with_reference: bool,
    tensor_parallel: int,
) -> tuple[int, int, int]:
    """Workers of policy, rollout and reference."""
    if not on_gpu:
        return _or(config.policy_workers, 1), _or(config.rollout_workers, 1), _or(config.reference_workers, 1)
    gpus = _whole(cluster.gpus)
    if colocated:
        policy = _or(config.policy_workers, gpus)
        return policy, _or(config.rollout_workers, policy), _or(config.reference_workers, policy)
    reference = _or(config.reference_workers, max(1, gpus // 8)) if with_reference else 0
    rest = gpus - reference
    if rest < 1 + tensor_parallel:
        raise PlacementError(
            f"the groups do not fit: {gpus} GPU(s) cannot hold a policy worker, a rollout worker of "
            f"{tensor_parallel} GPU(s)"
            f"{' and a reference worker' if with_reference else ''} on GPUs of their own. Use --colocate "
            "true, or add GPUs."
        )
    engines = _or(config.rollout_workers, max(1, (rest // 2) // tensor_parallel))
    return _or(config.policy_workers, max(1, rest - engines * tensor_parallel)), engines, reference


def _reserved_for(role: str, cluster: ClusterInfo) -> dict[str, float]:
    """Where nodes declare a Ray resource by the name of a role, that role's workers are placed only there."""
    return {role: 1.0} if any(role in resources for resources in cluster.nodes.values()) else {}


def _on_gpu(config: SFTConfig | RLHFConfig, cluster: ClusterInfo) -> bool:
    """A cluster whose GPUs are all taken is no reason to train on its CPUs unasked: that ends in a
    PlacementError.
    """
    return cluster.has_gpus and config.gpus_per_policy_worker != 0


def _cpu_share(cluster: ClusterInfo, workers: int, on_gpu: bool) -> float:
    """Cores a worker asks for: one each where they suffice, else an equal share of what there is."""
    cores = max(cluster.cpus, 0.01)
    if on_gpu or workers <= cores:
        return min(1.0, cores / workers)
    return int(cores / workers * 100) / 100


def _threads(cluster: ClusterInfo, workers: int, on_gpu: bool) -> int:
    """Threads of one worker of a role: its share of a node's cores, as the roles take turns."""
    nodes = max(len(cluster.nodes), 1)
    per_node = max(cluster.cpus / nodes, 1.0)
    workers_per_node = max(1, -(-workers // nodes))
    limit = 8 if on_gpu else 64
    return max(1, min(limit, int(per_node // workers_per_node)))


def _gpu(on_gpu: bool, share: float) -> float:
    return round(share, 2) if on_gpu else 0.0


def _whole(value: float) -> int:
    return max(1, int(value + 1e-9))


def _or(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given
