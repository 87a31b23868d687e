"""`--dry_run true`: who would run where, and what a GPU would hold, without data and without actors."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from raytune_rl.config import PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.cluster import described
from raytune_rl.errors import ConfigError
from raytune_rl.groups import specs
from raytune_rl.groups.growth import check_growth
from raytune_rl.groups.sizes import offline_groups, online_groups
from raytune_rl.pipelines import memory, report
from raytune_rl.pipelines.lifecycle import note
from raytune_rl.pipelines.local_paths import made_absolute
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.runtime import gpu_memory
from raytune_rl.runtime.cluster import ClusterInfo, session
from raytune_rl.runtime.placement import check_fits, make_layout
from raytune_rl.tracking.plan import RunPlan, Section

TrainConfig = SFTConfig | PreferenceConfig | RLHFConfig
CPUS_A_GPU = 8
"""Cores taken for a node that is only described."""


@dataclass(frozen=True)
class Described:
    """The cluster that a plan is for.

    Attributes:
        info: Its nodes.
        gpu_bytes: Memory of its smallest GPU; None where nobody can tell.
    """

    info: ClusterInfo
    gpu_bytes: int | None


def run(config: TrainConfig) -> RunPlan:
    """Prints the plan, and returns it.

    Raises:
        PlacementError: The groups do not fit, or a GPU's memory does not.
        ModelError: The model's config cannot be read.
    """
    config = made_absolute(config)
    with ExitStack() as stack:
        cluster = _cluster(config, stack)
    if isinstance(config, RLHFConfig):
        groups = online_groups(config, cluster.info, algorithm_of(config).needs)
    else:
        groups = offline_groups(config, cluster.info)
    specs.check_machine(config, groups.on_gpu)
    growth = check_growth(groups, cluster.info)
    check_fits(make_layout(groups.fixed), groups.fixed, cluster.info.nodes)
    plan = RunPlan(
        f"Dry run: {config.model}, {config.train_type}",
        report.group_plans(
            groups, {s.name: "" for s in groups.specs} | {"policy": report.trainer(config, groups)}
        ),
        [_nodes(cluster)],
        ["data was not read: how many steps the run has is not known yet", *growth],
    )
    with_memory, problem = memory.added(plan, config, groups, cluster.gpu_bytes)
    Console().print(with_memory.render())
    if problem is not None:
        raise problem
    return with_memory


def refuse(config: TrainConfig) -> None:
    """For the pipelines that would train.

    Raises:
        ConfigError: A dry run is asked for.
    """
    if config.dry_run:
        raise ConfigError("dry_run: call run_plan(config), which starts nothing and returns the plan.")


def _nodes(cluster: Described) -> Section:
    """The machine and data that there are, as a part of the plan."""
    rows = [
        (name, f"{have.get('GPU', 0):g} GPUs, {have.get('CPU', 0):g} CPUs")
        for name, have in cluster.info.nodes.items()
    ]
    return Section(f"Cluster: {cluster.info.address}", rows)


def _cluster(config: TrainConfig, stack: ExitStack) -> Described:
    if config.cluster is not None:
        nodes = described(config.cluster)
        info = {
            f"node {number}": {"GPU": float(gpus), "CPU": float(CPUS_A_GPU * gpus)}
            for number, (gpus, _) in enumerate(nodes, 1)
        }
        return Described(ClusterInfo(False, "as --cluster says", info, 0, True), min(b for _, b in nodes))
    if config.ray_address or os.environ.get("RAY_ADDRESS"):
        joined = stack.enter_context(session(config.ray_address, note))
        return Described(joined, gpu_memory.of(joined))
    gpus = gpu_memory.here()
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = gpus[: len([name for name in visible.split(",") if name.strip()])]
    has = {"CPU": float(os.cpu_count() or 1), **({"GPU": float(len(gpus))} if gpus else {})}
    return Described(
        ClusterInfo(True, "this machine", {"this machine": has}, 0, bool(gpus)), min(gpus, default=None)
    )
