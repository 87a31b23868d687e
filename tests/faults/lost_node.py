"""A program: a run on a cluster of three nodes, of which the one with the policy is removed after the first
checkpoint. It prints as JSON what became of the run.

It has a process of its own, because a cluster of several logical nodes cannot share one with other tests.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online


def remove(cluster: Cluster, output: Path, removed: list[str]) -> None:
    """Waits for the first checkpoint, and takes away the node that the policy is on."""
    while not list(output.glob("*/checkpoint-2")):
        time.sleep(0.1)
    node = next(
        state["Address"]["NodeID"]
        for state in ray._private.state.actors().values()
        if state["ActorClassName"] == "TrainerWorker" and state["State"] == "ALIVE"
    )
    (lost,) = [one for one in cluster.worker_nodes if one.node_id == node]
    removed.append(node)
    cluster.remove_node(lost, allow_graceful=False)


def main() -> None:
    settings = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=6, object_store_memory=300_000_000)
    removed: list[str] = []
    output = Path(settings["output_dir"])
    threading.Thread(target=remove, args=(cluster, output, removed), daemon=True).start()
    result = online.run(RLHFConfig(**settings, ray_address=cluster.address))
    print(
        "\n" + json.dumps({"removed": removed, "run_dir": str(result.run_dir), "status": result.status}),
        flush=True,
    )


if __name__ == "__main__":
    main()
