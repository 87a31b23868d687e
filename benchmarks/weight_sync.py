"""How fast weights get into the object store and out of it, beside the machine's own memcpy.

For each size one policy rank of the product (DeepSpeed ZeRO-2 over a Qwen2 of that size, float32) publishes
version after version, as a run does: from the controller's call until the weight store knows the version. A
reader then maps it and copies every tensor into memory of its own, as an engine does when it loads. In turns
with them, in the same processes, the physical limits are measured:

  memcpy    the same tensors into memory that is already there
  fresh     the same tensors into shared memory that nobody has touched, where each page costs a fault: what a
            first publication has to do. Later ones find their pages touched, if the object store had time to
            free what the version before last held: between publications the program waits, as a training step
            would make it
  a call    an empty call to the same actor: no publication can be faster, however small

Figures are medians over the later half of the rounds, ratios the medians of the rounds' own ratios. Nothing
is downloaded. The largest size takes some 6 GB of memory and 4 GB of shared memory.

With --delta: bfloat16 weights that are published whole and as their difference to an older version
(`--weight_delta`), in turns, while AdamW moves float32 copies of them by gradients that are noise, as those
of reinforcement learning nearly are: at a learning rate of 1e-6 (RL) and of 1e-5 (SFT). Means over all
versions after the first, those that are whole again among them. A difference saves bytes between machines and
costs seconds within one: below the last column's speed of the network it pays.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.clock import Clock
from benchmarks.table import machine, median, render
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.config import deepspeed
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, TunerSettings
from raytune_rl.protocol.train import OptimizerSpec, TrainerSpec
from raytune_rl.runtime.cluster import NAMESPACE, reserve
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.weights import find_manifest, read, start_store
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.trainer import TrainerWorker, trainer_env

PAUSE_S = 1.5
DEADLINE_S = 300.0


class MeasuredPolicy(TrainerWorker):
    """A rank that also knows how long the same bytes take without the object store."""

    def _sources(self) -> list[Any]:
        assert self._publisher is not None
        return [tensor.reshape(-1).numpy() for _, tensor in self._publisher._exporter.tensors()]

    def memcpy(self) -> float:
        """Seconds of copying the weights into memory that is already there."""
        if not hasattr(self, "_targets"):
            self._targets = [source.copy() for source in self._sources()]
        sources = self._sources()
        started = time.perf_counter()
        for target, source in zip(self._targets, sources, strict=True):
            np.copyto(target, source)
        return time.perf_counter() - started

    def move(self, learning_rate: float) -> None:
        """A step of AdamW on float32 copies of the weights, by gradients that are noise."""
        import torch

        weights = [p for p in self._engine.module.parameters() if p.requires_grad]
        if getattr(self, "_moves_by", None) != learning_rate:
            self._moves_by = learning_rate
            self._masters = [torch.nn.Parameter(w.detach().float()) for w in weights]
            self._mover = torch.optim.AdamW(self._masters, learning_rate, betas=(0.9, 0.95), fused=True)
        for master in self._masters:
            master.grad = torch.randn(master.shape)
        self._mover.step()
        with torch.no_grad():
            for weight, master in zip(weights, self._masters, strict=True):
                weight.copy_(master)

    def fresh(self) -> float:
        """Seconds of copying them into shared memory whose pages are not there yet."""
        sources = self._sources()
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.ftruncate(file.fileno(), sum(source.nbytes for source in sources))
            with mmap.mmap(file.fileno(), 0) as shared:
                at, started = 0, time.perf_counter()
                for source in sources:
                    target = np.frombuffer(shared, source.dtype, source.size, at)
                    np.copyto(target, source)
                    at += source.nbytes
                seconds = time.perf_counter() - started
                del target
        return seconds


class Reader:
    """A rollout worker without an engine."""

    def load(self, store: str, version: int) -> float:
        """Seconds of finding a version, mapping it and copying it out."""
        import torch

        if not hasattr(self, "_targets"):
            found = read(find_manifest(store, version, DEADLINE_S), DEADLINE_S)
            self._targets = {name: torch.zeros_like(tensor) for name, tensor in found}
        started = time.perf_counter()
        for name, tensor in read(find_manifest(store, version, DEADLINE_S), DEADLINE_S):
            self._targets[name].copy_(tensor)
        return time.perf_counter() - started


@dataclass(frozen=True)
class Round:
    """One version of one size, seconds; and CPU-seconds of all processes."""

    publish: float
    load: float
    memcpy: float
    fresh: float
    call: float
    publish_cpu: float
    load_cpu: float


def model_of(megabytes: int, directory: Path) -> Path:
    """A Qwen2 whose float32 weights are about that large: nine squares of its width a layer, four layers."""
    hidden = max(64, round(math.sqrt(megabytes * 10**6 / 4 / 36) / 32) * 32)
    return make_tiny_model(directory / f"model-{megabytes}", hidden=hidden)


def policy_spec(model: Path, dtype: str = "float32") -> TrainerSpec:
    """A policy as GRPO trains it."""
    return TrainerSpec(
        model=ModelSpec(str(model), dtype, None, "padded"),
        tuner=TunerSettings(tuner_type="full"),
        optimizer=OptimizerSpec(1e-6, "constant", 0, 10, (0.9, 0.95), 1e-8, 0.1, 1.0, deepspeed.load(None)),
        loss="grpo",
        loss_settings=GRPOSettings(beta=0.0),
        score=ScoreSettings(1.0, DEADLINE_S),
        seed=0,
        gradient_checkpointing=False,
        publish_mode="full",
    )


@contextmanager
def started(model: Path, dtype: str, name: str) -> Iterator[tuple[PolicyGroup, Any, Any]]:
    """A policy of one rank, a weight store of that name, and a reader."""
    spec = policy_spec(model, dtype)
    threads = len(os.sched_getaffinity(0))
    wanted = GroupSpec("policy", 1, cpus=1)
    store, reader = start_store(name), ray.remote(Reader).options(num_cpus=0).remote()
    with reserve([wanted], DEADLINE_S) as slots:
        group = WorkerGroup(
            wanted,
            slots["policy"],
            MeasuredPolicy,
            lambda rank: {"spec": spec, "rank": rank, "world_size": 1},
            trainer_env(threads, on_gpu=False),
            DEADLINE_S,
        )
        policy = PolicyGroup(TrainerWorld(group, spec, 4096, DEADLINE_S))
        policy.ready()
        ray.get(store.__ray_ready__.remote())
        yield policy, store, reader
        group.shutdown()
    for actor in (reader, store):
        ray.kill(actor)


def measure(megabytes: int, rounds: int, scratch: Path) -> tuple[int, list[Round]]:
    """Bytes of a version, and all rounds of one size."""
    name = f"benchmark-weights-{megabytes}"
    found, clock = [], Clock(cpu=True)
    with started(model_of(megabytes, scratch), "float32", name) as (policy, store, reader):
        group = policy.world.group
        # Two versions stay in the store, so the first that can find its pages touched is the third or later.
        for version in range(rounds + 3):
            cpu = [clock.now()]
            began = time.perf_counter()
            manifest = policy.publish(version)
            ray.get(store.publish.remote(manifest))
            publish = time.perf_counter() - began
            cpu.append(clock.now())
            load = ray.get(reader.load.remote(name, version))
            cpu.append(clock.now())
            memcpy, fresh = group.call("memcpy")[0], group.call("fresh")[0]
            began = time.perf_counter()
            group.call("ping")
            call = time.perf_counter() - began
            found.append(Round(publish, load, memcpy, fresh, call, cpu[1] - cpu[0], cpu[2] - cpu[1]))
            size = manifest.nbytes
            del manifest
            time.sleep(PAUSE_S)
    return size, found


@dataclass(frozen=True)
class Way:
    """One version published whole, or as a difference where that is smaller."""

    nbytes: int
    publish: float
    load: float
    cpu: float


def measure_delta(megabytes: int, learning_rate: float, rounds: int, scratch: Path) -> list[list[Way]]:
    """Version by version whole and as a difference, in turns, with a store each."""
    found: list[list[Way]] = [[], []]
    clock = Clock(cpu=True)
    name = f"benchmark-delta-{megabytes}-{learning_rate}"
    with started(model_of(2 * megabytes, scratch), "bfloat16", name) as (whole, store, reader):
        ways = [
            (whole, name, store),
            (PolicyGroup(whole.world, True), f"{name}-on", start_store(f"{name}-on")),
        ]
        for version in range(rounds + 1):
            whole.world.group.call("move", learning_rate)
            for way, (policy, named, keeps) in zip(found, ways, strict=True):
                cpu, began = clock.now(), time.perf_counter()
                manifest = policy.publish(version)
                ray.get(keeps.publish.remote(manifest))
                publish = time.perf_counter() - began
                load = ray.get(reader.load.remote(named, version))
                if version:
                    way.append(Way(manifest.sent_nbytes, publish, load, clock.now() - cpu))
                del manifest
                time.sleep(PAUSE_S)
        ray.kill(ways[1][2])
    return found


def delta_row(megabytes: int, learning_rate: float, rounds: int, scratch: Path) -> list[str]:
    """A line of the table of differences."""
    whole, delta = measure_delta(megabytes, learning_rate, rounds, scratch)

    def mean(ways: list[Way], value: Callable[[Way], float]) -> float:
        return sum(map(value, ways)) / len(ways)

    def ms(ways: list[Way], value: Callable[[Way], float]) -> str:
        return f"{mean(ways, value) * 1e3:.0f}"

    size = whole[0].nbytes
    seconds = [mean(ways, lambda way: way.publish + way.load) for ways in (whole, delta)]
    saved = size - mean(delta, lambda way: way.nbytes)
    pays = "always" if seconds[1] <= seconds[0] else f"{8 * saved / (seconds[1] - seconds[0]) / 1e9:.1f}"
    return [
        f"{size / 1e6:,.0f} MB",
        f"{learning_rate:g}",
        f"{delta[0].nbytes / size:.1%}",
        f"{mean(delta, lambda way: way.nbytes) / size:.1%}",
        f"{sum(way.nbytes == size for way in delta)} of {len(delta)}",
        ms(whole, lambda way: way.publish),
        ms(delta, lambda way: way.publish),
        ms(whole, lambda way: way.load),
        ms(delta, lambda way: way.load),
        ms(whole, lambda way: way.cpu),
        ms(delta, lambda way: way.cpu),
        pays if saved > 0 else "never",
    ]


def row_of(size: int, found: list[Round]) -> list[str]:
    """A line of the table."""
    first, late = found[0], found[len(found) // 2 :]

    def speed(seconds: float) -> str:
        return f"{size / seconds / 1e9:.1f}"

    return [
        f"{size / 1e6:,.0f} MB",
        speed(median(r.memcpy for r in late)),
        speed(median(r.fresh for r in late)),
        f"{median(r.call for r in late) * 1e3:.1f}",
        f"{median(r.publish for r in late) * 1e3:.1f}",
        speed(median(r.publish for r in late)),
        f"{median(r.memcpy / r.publish for r in late):.2f}",
        f"{median((r.memcpy + r.call) / r.publish for r in late):.2f}",
        speed(first.publish),
        f"{first.fresh / first.publish:.2f}",
        speed(median(r.load for r in late)),
        f"{median(r.memcpy / r.load for r in late):.2f}",
        f"{median(r.publish_cpu for r in late) * 1e3:.0f}",
        f"{median(r.load_cpu for r in late) * 1e3:.0f}",
    ]


HEADER = [
    "size",
    "memcpy GB/s",
    "fresh GB/s",
    "a call ms",
    "publish ms",
    "GB/s",
    "/ memcpy",
    "/ (memcpy + a call)",
    "first publish GB/s",
    "/ fresh",
    "load GB/s",
    "/ memcpy",
    "publish CPU ms",
    "load CPU ms",
]


DELTA_HEADER = [
    "size",
    "learning rate",
    "first / whole",
    "bytes / whole",
    "whole again",
    "publish ms whole",
    "difference",
    "load ms whole",
    "difference",
    "CPU ms whole",
    "difference",
    "pays below Gbit/s",
]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/weight_sync.py",
    )
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="sizes (default 10 100 1000)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="publications of each size (default 12)")
    parser.add_argument("--delta", action="store_true", help="differences beside whole versions")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=5 * 10**9,
    )
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
        if args.delta:
            rows = [
                delta_row(megabytes, learning_rate, args.rounds, Path(scratch))
                for megabytes in args.megabytes
                for learning_rate in (1e-6, 1e-5)
            ]
        else:
            rows = [row_of(*measure(megabytes, args.rounds, Path(scratch))) for megabytes in args.megabytes]
    ray.shutdown()
    of = "means" if args.delta else f"medians of the later half of {args.rounds + 3}"
    print(f"\nA version published, from call to known ({of})")
    print(machine() + "\n")
    print(render(DELTA_HEADER if args.delta else HEADER, rows, args.markdown))


if __name__ == "__main__":
    main()
