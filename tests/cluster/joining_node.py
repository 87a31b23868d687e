"""A program: a run with --rollout_workers 1:2 on a cluster that has room for one engine; a second node joins
after the first steps. It prints as JSON what became of the run.

It has a process of its own, because a cluster of several logical nodes cannot share one with other tests.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.cluster.test_async_variants import run


def join(cluster: Cluster, output: Path) -> None:
    """Adds a node once the run has logged two steps."""
    while sum(len(path.read_text().splitlines()) for path in output.glob("*/logging.jsonl")) < 2:
        time.sleep(0.1)
    cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
    print("a node has joined", flush=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "include_dashboard": False, "object_store_memory": 300_000_000},
    )
    threading.Thread(target=join, args=(cluster, Path(settings["output_dir"])), daemon=True).start()
    result = run({**settings, "ray_address": cluster.address})
    print("\n" + json.dumps({"run_dir": str(result.run_dir), "status": result.status}), flush=True)


if __name__ == "__main__":
    main()
