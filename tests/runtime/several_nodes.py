"""A program: reserves groups on a Ray cluster of several nodes, and prints as JSON where they came to lie.

Nodes and GPUs are declared, not real, which is all that placement looks at. It runs in a process of its own
because a cluster of several logical nodes cannot share one with other tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import PlacementError
from raytune_rl.groups.sizes import online_groups
from raytune_rl.runtime.cluster import describe, reserve, session
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec

GPUS = (8, 3, 5)
EACH: dict[str, Any] = {
    "colocate": False, "beta": 0.0, "policy_workers_per_node": 2, "rollout_workers_per_node": 1,
}  # fmt: skip


class Place:
    """A worker that says where it is."""

    def where(self) -> tuple[str, list[str], str | None]:
        """Node, GPUs in Ray's books, and what its libraries see of them."""
        context = ray.get_runtime_context()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return context.get_node_id(), context.get_accelerator_ids()["GPU"], seen


def config(**settings: Any) -> RLHFConfig:
    shape: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}
    return RLHFConfig(**shape, train_type="full", per_device_train_batch_size=8, **settings)


def reserved(groups: Sequence[GroupSpec]) -> dict[str, list[tuple[str, int]]]:
    """Node and bundle of each worker, in rank order."""
    with reserve(groups, 60) as slots:
        return {name: [(s.node.node_id, s.bundle_index) for s in places] for name, places in slots.items()}


def refusal() -> str:
    groups = [GroupSpec("policy", 1, cpus=1, gpus=9)]
    try:
        with reserve(groups, 60):
            return "placed"
    except PlacementError as error:
        return str(error)


def seen_by(groups: Sequence[GroupSpec]) -> dict[str, list[tuple[str, list[str], str | None]]]:
    """What real actors see, by group."""
    with reserve(groups, 60) as slots:
        seen = {}
        for spec in groups:
            group = WorkerGroup(spec, slots[spec.name], Place, lambda _: {}, timeout_s=120)
            seen[spec.name] = group.call("where")
            group.shutdown()
        return seen


def workers() -> dict[str, list[tuple[str, list[str], str | None]]]:
    """The devices of actors that share a GPU, two by two, over all nodes."""
    return seen_by(
        [
            GroupSpec("policy", 4, cpus=0.1, gpus=0.6),
            GroupSpec("rollout", 4, cpus=0.1, gpus=0.4, colocate_with="policy"),
        ]
    )


def apart() -> dict[str, list[tuple[str, list[str], str | None]]]:
    """The devices of actors that have their own, of engines over two, and of one that has none."""
    # As in a shell that says what Ray itself would say: each process sees its own all the same.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "0,1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return seen_by(
        [
            GroupSpec("policy", 2, cpus=0.1, gpus=1),
            GroupSpec("rollout", 2, cpus=0.1, gpus=2),
            GroupSpec("reward", 1, cpus=0.1),
        ]
    )


def main() -> None:
    cluster = Cluster()
    for gpus in GPUS:
        small: dict[str, Any] = {"object_store_memory": 10**8, "include_dashboard": False}
        cluster.add_node(num_cpus=16, num_gpus=gpus, **small)
    with session(cluster.address) as info:
        before = info.nodes
        found = {
            "joined": not info.started_here,
            "gpus": info.gpus,
            "shared": reserved(online_groups(config(), info, {"ref_logprobs"}).specs),
            "apart": reserved(online_groups(config(colocate=False), info, {"ref_logprobs"}).specs),
            "per_node": reserved(online_groups(config(**EACH), info, {"ref_logprobs"}).specs),
            "refused": refusal(),
            "workers": workers(),
            "apart_seen": apart(),
            "given_back": describe().nodes == before,
        }
        print("FOUND " + json.dumps(found))
    cluster.shutdown()


if __name__ == "__main__":
    main()
