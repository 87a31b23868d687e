"""Ray itself places the job's groups on nodes such as the manifest describes.

In a process of its own: a cluster of several logical nodes cannot share one with other tests. The
GPUs and their nodes are declared, not real, which is all that placement looks at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.deploy.test_manifests import nodes

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from raytune_rl.config import RLHFConfig
from raytune_rl.config.parser import parse
from raytune_rl.groups.sizes import online_groups
from raytune_rl.runtime.cluster import describe, reserve
from tests.deploy.test_manifests import entrypoint

nodes = json.loads(sys.argv[1])
cluster = Cluster()
name_of = {}
for name, have in nodes.items():
    custom = {k: v for k, v in have.items() if k not in ("CPU", "GPU")}
    small = {"object_store_memory": 10**8, "include_dashboard": False}
    node = cluster.add_node(num_cpus=have["CPU"], num_gpus=have["GPU"], resources=custom, **small)
    name_of[node.node_id] = name
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
config = parse(entrypoint(), RLHFConfig, environ={}).config
groups = online_groups(config, describe(), {"ref_logprobs"})
with reserve(groups.specs, 60) as slots:
    where = {}
    for role, places in slots.items():
        table = placement_group_table(places[0].placement_group)["bundles_to_node_id"]
        where[role] = [name_of[table[slot.bundle_index]] for slot in places]
print("PLACED " + json.dumps(where))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.cluster
def test_ray_places_each_role_on_its_own_nodes() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(nodes())],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    placed = [line for line in run.stdout.splitlines() if line.startswith("PLACED ")]
    assert placed, run.stderr[-3000:]
    where = {role: Counter(names) for role, names in json.loads(placed[0].removeprefix("PLACED ")).items()}
    assert where["policy"] == {"policy-0": 8}
    assert where["rollout"] == {"rollout-0": 7}
    assert where["reference"] == {"rollout-0": 1}
    assert "head-0" not in where["reward"], "no worker runs beside Ray's own services"
