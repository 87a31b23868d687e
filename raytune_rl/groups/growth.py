"""Whether a cluster has room for all engines that a run may come to have."""

from __future__ import annotations

from dataclasses import replace

from raytune_rl.errors import ConfigError
from raytune_rl.groups.sizes import Groups
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import find_homeless, make_layout


def check_growth(groups: Groups, cluster: ClusterInfo) -> list[str]:
    """Refuses engines that there can never be a place for; says where a place for all of them is still to
    come.

    Raises:
        ConfigError: This machine alone cannot hold the most that are asked for.
    """
    if groups.elastic is None:
        return []
    bounds = groups.elastic
    room = max((n for n in range(bounds.most + 1) if _holds_engines(groups, n, cluster)), default=0)
    if room >= bounds.most:
        return []
    if cluster.started_here:
        fits = str(room) if room <= bounds.least else f"{bounds.least}:{room}"
        raise ConfigError(
            f"--rollout_workers {bounds.least}:{bounds.most}: this machine has room for {room} engine(s) "
            "beside the other groups, and no autoscaler could add one: "
            + (f"write {fits}" if room else "ask for smaller groups")
            + ", or join a cluster that grows (--ray_address)."
        )
    start = "" if room >= bounds.least else f", and the run starts with {bounds.least}"
    return [
        f"--rollout_workers {bounds.least}:{bounds.most}: the cluster has room for {room} engine(s) "
        f"now{start}; others start when its autoscaler, or somebody, adds nodes"
    ]


def _holds_engines(groups: Groups, engines: int, cluster: ClusterInfo) -> bool:
    specs = [replace(s, workers=engines) if s.name == "rollout" else s for s in groups.specs]
    return find_homeless(make_layout(specs), cluster.nodes) is None
