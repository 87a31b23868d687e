"""How fast weights get into the object store and out of it, beside the machine's own memcpy.

For each size: a publisher actor returns its buckets as `PolicyWorker.publish` does, the store gets to know
them, and a reader actor maps them and copies every tensor into memory of its own, as an engine does when it
loads. Everything is measured in one run; the first publication touches fresh pages of shared memory ("cold"),
later ones find them ("warm"), if the object store had time to free what the version before last held: between
publications the program waits, as a training step would make it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from sys import path
from typing import Any

import numpy as np
import ray

path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.table import machine, median, render
from raytune_rl.runtime.cluster import NAMESPACE
from raytune_rl.runtime.weights import (
    Manifest,
    entry_of,
    find_manifest,
    plan_buckets,
    read,
    start_store,
    to_bytes,
)

TENSORS = 48
STORE = "benchmark-weights"
PAUSE_S = 1.5


class Publisher:
    """A policy rank without a policy: float32 tensors of the given size in all."""

    def __init__(self, megabytes: int) -> None:
        import torch

        each = megabytes * 10**6 // 4 // TENSORS
        self._named = [(f"layers.{i}.weight", torch.rand(each)) for i in range(TENSORS)]

    def index(self) -> Any:
        entries = [entry_of(name, tensor) for name, tensor in self._named]
        self._buckets = plan_buckets(entries)
        return tuple(tuple(entries[i] for i in bucket) for bucket in self._buckets)

    def publish(self) -> tuple[Any, ...]:
        buckets = [[to_bytes(self._named[i][1]) for i in bucket] for bucket in self._buckets]
        return len(buckets), *buckets

    def memcpy(self) -> float:
        """GB/s of copying the same tensors into memory that is already there."""
        targets = [np.ascontiguousarray(tensor.numpy()) * 1 for _, tensor in self._named]
        started = time.perf_counter()
        for target, (_, tensor) in zip(targets, self._named, strict=True):
            np.copyto(target, tensor.numpy())
        return sum(t.nbytes for t in targets) / (time.perf_counter() - started) / 1e9


class Reader:
    """A rollout worker without an engine."""

    def load(self, version: int) -> float:
        """GB/s of finding a version, mapping it and copying it out."""
        import torch

        if not hasattr(self, "_targets"):
            self._targets = {
                n: torch.zeros_like(t) for n, t in read(find_manifest(STORE, version, 60.0), 60.0)
            }
        started = time.perf_counter()
        manifest = find_manifest(STORE, version, 60.0)
        for name, tensor in read(manifest, 60.0):
            self._targets[name].copy_(tensor)
        return manifest.nbytes / (time.perf_counter() - started) / 1e9


def measure(megabytes: int, rounds: int) -> dict[str, float]:
    """All figures of one size, GB/s."""
    publisher = ray.remote(Publisher).options(num_cpus=0).remote(megabytes)
    reader = ray.remote(Reader).options(num_cpus=0).remote()
    store = start_store(STORE)
    index = ray.get(publisher.index.remote())
    publish, load, memcpy = [], [], []
    for version in range(rounds + 2):
        started = time.perf_counter()
        acknowledged, *buckets = publisher.publish.options(num_returns=1 + len(index)).remote()
        ray.get(acknowledged)
        manifest = Manifest(version, "full", tuple(buckets), index)
        ray.get(store.publish.remote(manifest))
        publish.append(manifest.nbytes / (time.perf_counter() - started) / 1e9)
        load.append(ray.get(reader.load.remote(version)))
        memcpy.append(ray.get(publisher.memcpy.remote()))
        del buckets, manifest
        time.sleep(PAUSE_S)
    for actor in (publisher, reader, store):
        ray.kill(actor)
    # Two versions stay in the store, so the first that finds its pages touched is the third or later.
    half = max(len(publish) // 2, 1)
    return {
        "cold": publish[0],
        "publish": median(publish[half:]),
        "load": median(load[half:]),
        "memcpy": median(memcpy[half:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="sizes (default 10 100 1000)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="publications of each size (default 10)")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    args = parser.parse_args()
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=5 * 10**9,
    )
    rows = []
    for megabytes in args.megabytes:
        found = measure(megabytes, args.rounds)
        rows.append(
            [
                f"{megabytes} MB",
                f"{found['memcpy']:.1f}",
                f"{found['cold']:.1f}",
                f"{found['publish']:.1f}",
                f"{found['publish'] / found['memcpy']:.2f}",
                f"{found['load']:.1f}",
                f"{found['load'] / found['memcpy']:.2f}",
            ]
        )
    ray.shutdown()
    header = ["size", "memcpy GB/s", "first publish", "publish", "/ memcpy", "load", "/ memcpy"]
    print(render(header, rows, args.markdown))
    print(machine())


if __name__ == "__main__":
    main()
