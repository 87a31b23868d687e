"""The cost of a GRPO step of ours beside the work that cannot be avoided.

One run measures, in turns, so that a busy neighbour disturbs all alike:

  a  a step of the product: `pipelines.online` itself, with its policy, rollout and reward actors
  b  vLLM alone: the same prompts, seeds and lengths, in the same engine
  c  a bare PyTorch loop that does the same training work on the same tokens, in one padded batch and in our
     micro-batches; the faster of the two counts

and prints a / (b + c), and where the step's time goes. Figures are medians over rounds; the ratio is the
median of the rounds' own ratios. Nothing is downloaded: the model is the 2.5 M-parameter one of
raytune_rl.tiny.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import ray

from benchmarks.bare_loop import BareLoop
from benchmarks.forced_rollout import ForcedRolloutWorker, long_tailed
from benchmarks.table import machine, median, render, spread
from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.credit.base import Credited
from raytune_rl.config import RLHFConfig
from raytune_rl.data.microbatch import plan_micro_batches
from raytune_rl.groups import specs, start
from raytune_rl.groups.seeds import sample_seed
from raytune_rl.pipelines import online
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tracking.timer import StepTimer

PHASES = ("generate", "reward", "train", "sync")
# Together with a question and the chat template, 46 tokens.
SYSTEM = "You are a helpful assistant. The user asks a question and the assistant solves it. Put it."
# The one padded batch of long-tailed rows is mostly padding; once it has clearly lost it is not run again.
HOPELESS = 1.5


@dataclass
class Measured:
    """One round of one shape, seconds."""

    step: float
    phases: dict[str, float]
    vllm: float
    torch: dict[str, float] = field(default_factory=dict)

    @property
    def other(self) -> float:
        return self.step - sum(self.phases.values())


class PhaseLog(StepTimer):
    """The product's timer, which also keeps what the loop's own `finish` in mid-step would forget."""

    def __init__(self, on_phase: Any) -> None:
        super().__init__(on_phase=on_phase)
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with super().phase(name):
            yield
        self.spent[name] += time.perf_counter() - started


class MeasuredRun(online.OnlineRun):
    """The product's loop; after each step the peers do the same work."""

    options: ClassVar[argparse.Namespace]
    measured: ClassVar[dict[str, list[Measured]]] = defaultdict(list)

    def train(self) -> None:
        self.shapes = {
            name: lengths_of(name, self.options.prompts * self.options.generations)
            for name in self.options.shapes
        }
        threads = str(self.actors.sizes.threads["policy"])
        self.peer = (
            ray.remote(BareLoop)
            .options(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}})
            .remote(self.config.model, 1e-6, self.config.temperature, self.config.epsilon)
        )
        self.engine = self.actors.rollout.workers
        self.run.timer = self.log = PhaseLog(self.run.timer._on_phase)
        self.turn = 0
        self.shape = self.next_shape()
        self.began = time.perf_counter()
        super().train()

    def next_shape(self) -> str:
        """Tells the engine the lengths of the coming step."""
        name = list(self.shapes)[self.turn % len(self.shapes)]
        self.engine.call("force", self.shapes[name])
        return name

    def train_step(
        self, trajectories: Sequence[Trajectory], credited: Credited, part: slice, metrics: dict[str, float]
    ) -> None:
        self.last = (trajectories, credited.advantages)
        super().train_step(trajectories, credited, part, metrics)

    def after_generation(self, last: bool) -> None:
        """The end of a step: takes its time, then gives the peers their turn. No checkpoint is written."""
        step = time.perf_counter() - self.began
        phases = {name: self.log.spent.pop(name, 0.0) for name in PHASES}
        found = Measured(step, phases, *self.vllm_alone(self.state.generation - 1))
        self.bare_torch(found)
        if self.turn >= self.options.warmup * len(self.shapes):
            self.measured[self.shape].append(found)
        self.turn += 1
        self.shape = self.next_shape()
        self.began = time.perf_counter()

    def vllm_alone(self, generation: int) -> tuple[float]:
        """b, on the prompts of the step just measured."""
        seeds = range(self.config.num_generations)
        requests = [
            EpisodeRequest(
                g, int(row), tuple(sample_seed(self.config.seed, generation, int(row), s) for s in seeds)
            )
            for g, row in enumerate(dict.fromkeys(t.prompt for t in self.last[0]))
        ]
        call = self.engine.submit(0, "alone", self.prompts.columns, requests, self.actors.rollout._sampling)
        seconds, tokens = ray.get(call.ref)
        assert tokens == sum(t.episode.completion_tokens for t in self.last[0]), (
            "vLLM alone did other work than we"
        )
        return (seconds,)

    def bare_torch(self, found: Measured) -> None:
        """c, on the tokens of the step just measured."""
        batch, advantages = self.last
        weights = row_weights(
            [t.episode.completion_tokens for t in batch],
            self.config.loss_type,
            self.config.max_completion_length,
        )
        budget = specs.max_tokens(self.config, self.actors.sizes.on_gpu)
        schedule = plan_micro_batches(
            [t.length for t in batch], world_size=1, max_tokens=budget, layout="padded"
        )
        cuts = {"micro-batches": schedule.ranks[0], "one batch": (tuple(range(len(batch))),)}
        for name, parts in cuts.items():
            if name == "one batch" and self.has_lost(name):
                continue
            pointers = [RowPointer(t.data.ref, t.data.row) for t in batch]
            found.torch[name], _ = ray.get(self.peer.step.remote(pointers, advantages, weights, parts))

    def has_lost(self, name: str) -> bool:
        """Whether a peer was so much slower than the other that it cannot become the faster."""
        past = [m.torch for m in self.measured[self.shape] if name in m.torch]
        return bool(past) and all(t[name] > HOPELESS * t["micro-batches"] for t in past)


def lengths_of(shape: str, count: int) -> list[int]:
    """Completion lengths, tokens."""
    return [64] * count if shape == "equal" else long_tailed(count, mean=64, longest=512)


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, list[Measured]]:
    """Runs the product's pipeline with the measuring loop and the forced lengths put in."""
    steps = (options.rounds + options.warmup) * len(options.shapes)
    count = options.prompts * options.generations
    config = RLHFConfig(
        model=str(make_tiny_model(scratch / "model")),
        dataset=str(write_dataset(scratch / "data").train),
        system=SYSTEM,
        reward_funcs=("accuracy", "format"),
        train_type="full",
        beta=0.0,
        num_generations=options.generations,
        per_device_train_batch_size=count,
        max_completion_length=512,
        max_steps=steps,
        learning_rate=1e-6,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
        output_dir=str(scratch / "output"),
    )
    MeasuredRun.options = options
    with (
        mock.patch.object(online, "OnlineRun", MeasuredRun),
        mock.patch.object(start, "RolloutWorker", ForcedRolloutWorker),
    ):
        online.run(config)
    return MeasuredRun.measured


def table(measured: dict[str, list[Measured]], markdown: bool) -> str:
    """One row a shape."""
    header = ["shape", "step", "b vLLM", "c torch", "step/(b+c)", "min-max", *PHASES, "other", "c was cut in"]
    rows = []
    for shape, rounds in measured.items():
        peers = {name: median(m.torch[name] for m in rounds if name in m.torch) for name in rounds[0].torch}
        best = min(peers, key=peers.__getitem__)
        ratios = [m.step / (m.vllm + m.torch[best]) for m in rounds if best in m.torch]
        times = [median(m.step for m in rounds), median(m.vllm for m in rounds), peers[best]]
        split = [median(m.phases[p] for m in rounds) for p in PHASES] + [median(m.other for m in rounds)]
        others = ", ".join(f"{name} {peers[name]:.2f}" for name in peers if name != best)
        rows.append(
            [
                shape,
                *(f"{t:.2f}" for t in times),
                f"{median(ratios):.2f}",
                spread(ratios),
                *(f"{t:.3f}" for t in split),
                f"{best} ({others})" if others else best,
            ]
        )
    return render(header, rows, markdown)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/grpo_step.py",
    )
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each shape (default 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each shape before them (default 2)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step (default 8)")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=("equal", "long-tailed"),
        default=["equal", "long-tailed"],
        help="64 tokens each; or log-normal lengths, mean 64, at most 512 (default: both, in turns)",
    )
    parser.add_argument(
        "--max_tokens_per_micro_batch",
        type=int,
        default=None,
        help="as in raytune-rl; default: the product's",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
        measured = measure(options, Path(scratch))
    count = options.prompts * options.generations
    print(f"\nGRPO step, {count} completions, seconds (medians of {options.rounds} rounds)")
    print(machine() + "\n")
    print(table(measured, options.markdown))


if __name__ == "__main__":
    main()
