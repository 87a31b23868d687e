"""How long a run stands still when a part of it is killed, and what being ready for that costs.

One PPO run with everybody in it (a policy of two ranks, critic, reference, reward functions, reward model,
engine, weight store) loses one of them after the other to SIGKILL, each in a step of its own as it is asked
for its work, with an undisturbed step behind it. Printed are the seconds

  noticed   from the kill until what was lost began to start anew
  starting  until it was up, with its model loaded: what a start takes at any rate
  then      until the step was trained: going back to the snapshot or pulling weights, doing the work again,
            and all that the step had yet to do
  beside    noticed and then, so all but the start; the aim is 5 s

and of another such run, with a snapshot after every second step, the median step that shares its time with
one and the median step that does not, in seconds and in CPU-seconds of all processes. Nothing is downloaded:
the model is one of raytune_rl.tiny.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

from benchmarks.clock import Clock
from benchmarks.table import machine, median, render, spread
from raytune_rl.config import PPOConfig
from raytune_rl.groups import restarts
from raytune_rl.groups.snapshots import History, Snapshot
from raytune_rl.groups.weight_store import WeightStore
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.weights import save_model
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
    "policy rank": ("policy", "train_step"),
    "critic": ("critic", "train_step"),
    "rollout engine": ("rollout", "run_group"),
    "reward worker": ("reward", "score"),
    "reward model": ("reward_model", "score"),
    "reference": ("reference", "logprobs"),
    "weight store": ("weight_store", "publish"),
}
"""By name, the group, and the call at which its last rank is killed."""
WARM_UP = 2
"""Steps before the first kill; they have the engine's own warm-up in them."""


@dataclass
class Loss:
    """One kill, and what came of it, seconds of the monotonic clock."""

    role: str
    killed: float
    noticed: float = 0.0
    up: float = 0.0
    stepped: float = 0.0

    def row(self) -> list[str]:
        noticed, then = self.noticed - self.killed, self.stepped - self.up
        seconds = (noticed, self.up - self.noticed, then, noticed + then)
        return [self.role, *(f"{value:.1f}" for value in seconds)]


class Watch:
    """Stands between the controller and what it calls, kills who is due, and takes the times.

    Args:
        roles: Who is killed, in this order.
    """

    def __init__(self, roles: Sequence[str] = ()) -> None:
        self._due = {WARM_UP + 2 * number: role for number, role in enumerate(roles)}
        self.losses: list[Loss] = []
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self._clock = Clock(cpu=True)
        self.snapshots: dict[int, int] = {}  # bytes of all worlds' by the steps before
        self.disturbed = set(self._due)

    def called(self, group: str, method: str, actor: Any) -> None:
        """An actor, the last of its group, was asked for something."""
        role = self._due.get(len(self.steps))
        if role is None or ROLES[role] != (group, method):
            return
        del self._due[len(self.steps)]
        pid = ray._private.state.actors(actor._actor_id.hex())["Pid"]
        self.losses.append(Loss(role, time.monotonic()))
        os.kill(pid, signal.SIGKILL)

    def ask(self, plain: Any, group: WorkerGroup, rank: int, call: Any) -> Any:
        pending = plain(group, rank, call)
        if rank == len(group) - 1:
            self.called(group.name, call.method, group._actors[rank])
        return pending

    def publish(self, plain: Any, store: WeightStore, manifest: Any) -> None:
        self.called("weight_store", "publish", store._actor)
        plain(store, manifest)

    def record(self, plain: Any, run: Any, metrics: Any) -> None:
        self.steps.append(time.monotonic())
        self.cpu.append(self._clock.now())
        if self.losses and not self.losses[-1].stepped:
            self.losses[-1].stepped = self.steps[-1]
        plain(run, metrics)

    def restart(self, plain: Any, group: WorkerGroup) -> None:
        self.losses[-1].noticed = time.monotonic()
        plain(group)

    def join(self, plain: Any, world: TrainerWorld) -> Any:
        facts = plain(world)
        self._up()
        return facts

    def renew(self, plain: Any, group: WorkerGroup, rank: int) -> None:
        self.losses[-1].noticed = time.monotonic()
        plain(group, rank)
        group._actors[rank].ping.remote().future().add_done_callback(lambda _: self._up())

    def started(self, plain: Any, store: WeightStore) -> Any:
        self.losses[-1].noticed = time.monotonic()
        actor = plain(store)
        ray.get(actor.ping.remote())
        self._up()
        return actor

    def take(self, plain: Any, history: History, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.steps] = self.snapshots.get(snapshot.steps, 0) + snapshot.nbytes
        plain(history, snapshot)

    def _up(self) -> None:
        self.losses[-1].up = time.monotonic()

    def undisturbed(self, times: Sequence[float], snapshot: bool) -> list[float]:
        """What steps behind the warm-up took in which nobody was killed, with a snapshot taken meanwhile or
        without; `times` are those of the steps' ends."""
        return [
            times[step] - times[step - 1]
            for step in range(WARM_UP, len(times))
            if step not in self.disturbed and (step in self.snapshots) == snapshot
        ]


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Runs inside are watched. Each loss counts as the first for a long time, so nobody waits before a
    start."""
    with mock.patch.object(restarts, "QUIET_S", 0.0):
        patches = [
            mock.patch.object(owner, name, _between(hook, getattr(owner, name)))
            for owner, name, hook in (
                (WorkerGroup, "_ask", watch.ask),
                (WorkerGroup, "restart", watch.restart),
                (WorkerGroup, "renew", watch.renew),
                (TrainerWorld, "_join", watch.join),
                (WeightStore, "publish", watch.publish),
                (WeightStore, "_started", watch.started),
                (lifecycle.Run, "record", watch.record),
                (History, "take", watch.take),
            )
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _between(hook: Any, plain: Any) -> Any:
    return lambda self, *args: hook(plain, self, *args)


def prepare(root: Path, hidden: int) -> float:
    """Model, reward model, data and reward function; the model's parameters, millions."""
    model = str(make_tiny_model(root / "model", tied=False, hidden=hidden, layers=4))
    torch.manual_seed(3)
    judge = load_model(model, scalar=True).model
    save_model(judge, root / "judge", load_tokenizer(model))
    write_dataset(root / "data", train=64, held_out=8, sft=8)
    (root / "plugin.py").write_text(PLUGIN)
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 4e6


def run(root: Path, watch: Watch, steps: int, **settings: Any) -> None:
    """A PPO run under a watch."""
    config = PPOConfig(
        model=str(root / "model"),
        dataset=str(root / "data" / "train.jsonl"),
        reward_funcs=["digits"],
        external_plugins=[str(root / "plugin.py")],
        reward_model=[str(root / "judge")],
        train_type="full",
        policy_workers=2,
        per_device_train_batch_size=8,
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
    with watched(watch):
        ppo.run(config)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--roles", nargs="*", default=list(ROLES), choices=list(ROLES), help="who is killed")
    parser.add_argument("--steps", type=int, default=42, help="of the run that measures snapshots; 0: none")
    parser.add_argument("--hidden", type=int, default=256, help="of the model")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    """Runs what is asked for and prints its tables."""
    chosen = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        millions = prepare(root, chosen.hidden)
        if chosen.roles:
            watch = Watch(chosen.roles)
            run(root, watch, WARM_UP + 2 * len(chosen.roles), snapshot_steps=1)
            print(f"\n{machine()}; {millions:.1f} M parameters")
            quiet = watch.undisturbed(watch.steps, snapshot=True)
            print(f"An undisturbed step takes {median(quiet):.1f} s ({spread(quiet)}).\n")
            header = ["killed", "noticed s", "starting s", "then s", "beside s"]
            print(render(header, [loss.row() for loss in watch.losses], chosen.markdown))
        if chosen.steps:
            watch = Watch()
            run(root, watch, chosen.steps, snapshot_steps=2)
            mib = median(watch.snapshots.values()) / 2**20
            size = f"{millions:.1f} M parameters each of policy and critic, {mib:.0f} MiB a snapshot of both"
            print(f"\n{machine()}; {size}\n")
            header = ["a step", "without", "min-max", "with a snapshot", "min-max", "difference"]
            rows = [cost(watch, "seconds", watch.steps), cost(watch, "CPU-seconds", watch.cpu)]
            print(render(header, rows, chosen.markdown))


def cost(watch: Watch, unit: str, times: Sequence[float]) -> list[str]:
    """A row of the second table."""
    without, with_one = (watch.undisturbed(times, snapshot=taken) for taken in (False, True))
    change = median(with_one) / median(without) - 1
    cells = [f"{median(without):.2f}", spread(without), f"{median(with_one):.2f}", spread(with_one)]
    return [unit, *cells, f"{change:+.1%}"]


if __name__ == "__main__":
    main()
