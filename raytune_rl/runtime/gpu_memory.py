"""How much memory the GPUs of a cluster have, asked of each node's driver without a CUDA context."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_rl.runtime.cluster import ClusterInfo

QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
TIMEOUT_S = 30.0


def here() -> list[int]:
    """Bytes of each GPU of this machine; empty where there is none, or no driver that tells. Of parts of GPUs
    (MIG) the driver tells the size of the whole, which is nobody's here.
    """
    if "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        return []
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse(told.stdout)


def parse(text: str) -> list[int]:
    """The answer of nvidia-smi, MiB a line. A part of a GPU (MIG) has none, and is left out."""
    return [int(line) * 2**20 for line in text.split("\n") if line.strip().isdigit()]


def of(cluster: ClusterInfo) -> int | None:
    """Bytes of a cluster's smallest GPU; None where it has none, or nobody can tell."""
    return smallest(list(cluster.ids.values())) if cluster.has_gpus else None


def smallest(node_ids: Sequence[str]) -> int | None:
    """Bytes of the smallest GPU of some nodes; None where nobody can tell, so that nothing is compared."""
    ask = ray.remote(num_cpus=0, max_retries=0)(here)
    refs = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in node_ids
    ]
    try:
        free_bytes = [size for sizes in ray.get(refs, timeout=2 * TIMEOUT_S) for size in sizes]
    except RayError:
        return None
    return min(free_bytes, default=None)
