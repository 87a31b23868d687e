"""A program: a run on a cluster of three nodes, of which the one with the policy is removed as the last step
is to be trained. It prints as JSON what became of the run.

It has a process of its own, because a cluster of several logical nodes cannot share one with other tests.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray.cluster_utils import Cluster

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from raytune_rl.pipelines.online import OnlineRun


def remove(cluster: Cluster) -> str:
    """Takes away the node that the policy is on, with its object store; its id."""
    states = ray._private.state.actors().values()
    ranks = [s for s in states if s["ActorClassName"] == "TrainerWorker" and s["State"] == "ALIVE"]
    node = ranks[0]["Address"]["NodeID"]
    (lost,) = [one for one in cluster.worker_nodes if one.node_id == node]
    cluster.remove_node(lost, allow_graceful=False)
    deadline = time.monotonic() + 60
    # On a machine that is gone nobody would finish a step.
    while any(Path(f"/proc/{rank['Pid']}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    return str(node)


def main() -> None:
    settings = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=6, object_store_memory=300_000_000)
    removed: list[str] = []
    steps: list[int] = []
    plain = OnlineRun.train_step

    def train_step(run: Any, *args: Any) -> None:
        if run.run.step == settings["max_steps"] - 1 and not removed:
            removed.append(remove(cluster))
        plain(run, *args)
        steps.append(run.run.step)

    with mock.patch.object(OnlineRun, "train_step", partialmethod(train_step)):
        result = online.run(RLHFConfig(**settings, ray_address=cluster.address))
    told = {"removed": removed, "run_dir": str(result.run_dir), "status": result.status, "steps": steps}
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
