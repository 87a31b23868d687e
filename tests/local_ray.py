"""The Ray of tests that run whole pipelines on this machine."""

from __future__ import annotations

from typing import Any

import ray

from raytune_rl.runtime.cluster import NAMESPACE


def start_ray(object_store_memory: int = 10**9, **more: Any) -> None:
    """With more logical CPUs than real ones: placement is under test, not speed."""
    ray.init(
        address="local",
        num_cpus=8,
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=object_store_memory,
        **more,
    )
