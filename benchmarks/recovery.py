"""How long a run stands still when a part of it is killed, and what being ready for that costs.

Each role in turn gets a SIGKILL in the middle of a PPO run (policy, critic, weight store, reference, reward,
engine). Printed are the seconds from the kill

  noticed   until the loss was known
  starting  that the start of what had to be started anew took by itself, and cannot be avoided
  beside    what recovery took beside that: ending what is left, going back to the snapshot, repeating steps
  back      until the next optimizer step was done, whatever it had to wait for; also in CPU-seconds of all
            processes

and for a snapshot after every step the median step with it and without it, in turns. Nothing is downloaded:
the model is one of raytune_rl.tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from benchmarks.clock import Clock
from benchmarks.table import machine, median, render, spread
from raytune_rl.config import PPOConfig
from raytune_rl.groups.keeper import Keeper
from raytune_rl.groups.weight_store import WeightStore
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.pipelines import lifecycle, ppo
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model

PLUGIN = """
from swift.rewards import ORM, orms

class Digits(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

orms["digits"] = Digits
"""
ROLES = {
    "policy": "train_step",
    "critic": "train_step",
    "reference": "logprobs",
    "reward": "score",
    "weight store": "",
}
KILLED_AT = 3
"""Step in which it happens, from 1: the first two have the engines' own warm-up in them."""


class Watch:
    """Times of a run, seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.killed = self.noticed = self.started = self.recovered = 0.0
        self.steps: list[float] = []
        self.clock = Clock(cpu=True)
        self.cpu_killed = 0.0
        self.cpu: list[float] = []

    def kill(self, actor: Any) -> None:
        """Kills an actor's process."""
        pid = ray._private.state.actors(actor._actor_id.hex())["Pid"]
        self.cpu_killed = self.clock.now()
        self.killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)


@contextmanager
def watched(watch: Watch, role: str | None) -> Iterator[None]:
    """The run inside is watched, and one of its processes killed in step `KILLED_AT`."""
    ask, record, start_anew, join = (
        WorkerGroup._ask,
        lifecycle.Run.record,
        Keeper._start_anew,
        TrainerWorld._join,
    )
    calls = {"count": 0}

    def asked(group: WorkerGroup, rank: int, call: Any) -> Any:
        pending = ask(group, rank, call)
        if role == group.name and call.method == ROLES[role] and rank == 0:
            calls["count"] += 1
            if calls["count"] == KILLED_AT:
                threading.Timer(0.05, watch.kill, (group._actors[rank],)).start()
        return pending

    def recorded(run: Any, metrics: Any) -> None:
        watch.steps.append(time.monotonic())
        watch.cpu.append(watch.clock.now())
        record(run, metrics)

    def began(keeper: Keeper) -> None:
        watch.noticed = time.monotonic()
        start_anew(keeper)
        watch.recovered = time.monotonic()

    def joined(world: TrainerWorld) -> Any:
        before = time.monotonic()
        facts = join(world)
        watch.started += time.monotonic() - before
        return facts

    def published(store: WeightStore, manifest: Any) -> None:
        if role == "weight store" and manifest.version == KILLED_AT:
            watch.kill(store._actor)
        publish(store, manifest)

    publish = WeightStore.publish
    with (
        mock.patch.object(WorkerGroup, "_ask", asked),
        mock.patch.object(lifecycle.Run, "record", recorded),
        mock.patch.object(Keeper, "_start_anew", began),
        mock.patch.object(TrainerWorld, "_join", joined),
        mock.patch.object(WeightStore, "publish", published),
    ):
        yield


def run(root: Path, steps: int, **settings: Any) -> Path:
    """A PPO run; its directory."""
    dataset = str(write_dataset(root / "data", train=64, held_out=8, sft=8).train)
    config = PPOConfig(
        model=str(root / "model"),
        dataset=dataset,
        reward_funcs=["digits"],
        external_plugins=[str(root / "plugin.py")],
        train_type="full",
        per_device_train_batch_size=16,
        num_mini_batches=1,
        num_ppo_epochs=1,
        max_completion_length=32,
        learning_rate=1e-5,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        output_dir=str(root / "out"),
        **settings,
    )
    return ppo.run(config).run_dir


def recovery(root: Path, role: str) -> list[str]:
    """A row of the first table."""
    watch = Watch()
    with watched(watch, role):
        run_dir = run(root, KILLED_AT + 2)
    (fault,) = [json.loads(line) for line in (run_dir / "faults.jsonl").read_text().splitlines()]
    back, cpu = next(
        (at - watch.killed, spent - watch.cpu_killed)
        for at, spent in zip(watch.steps, watch.cpu, strict=True)
        if at > watch.killed
    )
    last = [f"{back:.1f}", f"{cpu:.1f}"]
    if not watch.noticed:  # replaced by another beside the run
        seconds = fault["recovered_s"]
        return [role, "-", "-", "-" if seconds is None else f"{seconds:.1f}", *last]
    beside = watch.recovered - watch.noticed - watch.started
    noticed = watch.noticed - watch.killed
    return [role, f"{noticed:.1f}", f"{watch.started:.1f}", f"{beside:.1f}", *last]


def cost(root: Path, steps: int, rounds: int) -> list[str]:
    """Steps with a snapshot each and without any, in turns."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for every in seconds:
            watch = Watch()
            with watched(watch, None):
                run(root, steps, snapshot_steps=every)
            seconds[every] += [b - a for a, b in zip(watch.steps[1:], watch.steps[2:], strict=False)]
    without, with_it = median(seconds[0]), median(seconds[1])
    return [f"{without:.3f}", f"{with_it:.3f}", f"{(with_it / without - 1):+.1%}", spread(seconds[1])]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--roles", nargs="*", default=list(ROLES), choices=list(ROLES))
    parser.add_argument("--steps", type=int, default=12, help="of each run that measures snapshots")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of such runs; 0: none")
    parser.add_argument("--hidden", type=int, default=256, help="of the model")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    """Runs what is asked for and prints its tables."""
    chosen = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tiny_model(root / "model", tied=False, hidden=chosen.hidden, layers=4)
        (root / "plugin.py").write_text(PLUGIN)
        print(machine())
        rows = [recovery(root, role) for role in chosen.roles]
        if rows:
            header = ["killed", "noticed s", "starting s", "beside s", "back s", "back CPU-s"]
            print(render(header, rows, chosen.markdown))
        if chosen.rounds:
            header = ["step s, no snapshot", "with one each", "difference", "min-max"]
            print(render(header, [cost(root, chosen.steps, chosen.rounds)], chosen.markdown))


if __name__ == "__main__":
    main()
