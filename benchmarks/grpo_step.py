"""The cost of a GRPO step of ours beside the work that cannot be avoided.

One run measures, in turns, so that a busy neighbour disturbs all alike:

  a  a step of the product: `pipelines.online` itself, with its policy, rollout and reward actors
  b  vLLM alone: the same prompts, seeds and lengths, in the same engine
  c  a bare PyTorch loop that does the same training work on the same tokens, in one padded batch and in our
     micro-batches; the faster of the two counts
  TRL  a step of TRL's GRPOTrainer, which samples by Transformers' `generate`, in an environment and a process
     of its own: as many prompts of the same length, completions of the same lengths, a reward that is free

and prints a / (b + c), a / TRL, and where the step's time goes. Figures are medians over rounds; ratios are
the medians of the rounds' own ratios. Each shape is a run of its own. But for TRL's environment (see
sft_throughput.py) nothing is downloaded: the model is the 2.5 M-parameter one of raytune_rl.tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import ray

from benchmarks import trl
from benchmarks.bare_loop import BareLoop
from benchmarks.clock import Clock, add_flag, measuring
from benchmarks.forced_rollout import ForcedRolloutWorker, long_tailed
from benchmarks.table import machine, median, render, spread
from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.credit.base import Credited
from raytune_rl.config import RLHFConfig
from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.microbatch import plan_micro_batches
from raytune_rl.groups import specs, start
from raytune_rl.groups.seeds import sample_seed
from raytune_rl.models.load import load_tokenizer
from raytune_rl.pipelines import online
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tracking.timer import StepTimer

PHASES = ("generate", "reward", "train", "sync")
SHAPES = ("46/64", "46/tail", "512/64", "2048/64")
MEAN, LONGEST = 64, 512
TAIL = "tail"
SYSTEM = "You are a helpful assistant. The user asks a question and the assistant solves it. "
ONE_BATCH = 2**16
"""Tokens of a padded batch that is tried at all."""
# The one padded batch of long-tailed rows is mostly padding; once it has clearly lost it is not run again.
HOPELESS = 1.5


@dataclass
class Measured:
    """One round of one shape, in the clock's seconds."""

    step: float
    phases: dict[str, float]
    vllm: float
    torch: dict[str, float] = field(default_factory=dict)
    trl: float = float("nan")
    trl_generate: float = float("nan")

    @property
    def other(self) -> float:
        return self.step - sum(self.phases.values())


class PhaseLog(StepTimer):
    """The product's timer, which also keeps what the loop's own `finish` in mid-step would forget."""

    def __init__(self, on_phase: Any, clock: Clock) -> None:
        super().__init__(on_phase=on_phase)
        self.clock = clock
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self.clock.now()
        with super().phase(name):
            yield
        self.spent[name] += self.clock.now() - started


class MeasuredRun(online.OnlineRun):
    """The product's loop; after each step the peers do the same work."""

    options: ClassVar[argparse.Namespace]
    clock: ClassVar[Clock]
    lengths: ClassVar[list[int]]
    trl: ClassVar[trl.Trl | None]
    measured: ClassVar[list[Measured]]

    def train(self) -> None:
        threads = str(self.actors.sizes.threads["policy"])
        self.peer = (
            ray.remote(BareLoop)
            .options(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}})
            .remote(self.config.model, 1e-6, self.config.temperature, self.config.epsilon)
        )
        self.engine = self.actors.rollout.workers
        self.run.timer = self.log = PhaseLog(self.run.timer._on_phase, self.clock)
        self.turn = 0
        self.engine.call("force", self.lengths)
        self.began = self.clock.now()
        super().train()

    def train_step(
        self, trajectories: Sequence[Trajectory], credited: Credited, part: slice, metrics: dict[str, float]
    ) -> None:
        self.last = (trajectories, credited.advantages)
        super().train_step(trajectories, credited, part, metrics)

    def after_generation(self) -> bool:
        """The end of a step: takes its time, then gives the peers their turn. No checkpoint is written."""
        step = self.clock.now() - self.began
        phases = {name: self.log.spent.pop(name, 0.0) for name in PHASES}
        found = Measured(step, phases, *self.vllm_alone(self.state.generation - 1))
        self.bare_torch(found)
        if self.trl is not None:
            done = self.trl.step()
            assert done["tokens"] == sum(self.lengths), "TRL did other work than we"
            found.trl, found.trl_generate = done["seconds"], done["generate_cpu"]
        if self.turn >= self.options.warmup:
            self.measured.append(found)
        self.turn += 1
        self.began = self.clock.now()
        return self.run.ends()

    def vllm_alone(self, generation: int) -> tuple[float]:
        """b, on the prompts of the step just measured."""
        seeds = range(self.config.num_generations)
        requests = [
            EpisodeRequest(
                g, int(row), tuple(sample_seed(self.config.seed, generation, int(row), s) for s in seeds)
            )
            for g, row in enumerate(dict.fromkeys(t.prompt for t in self.last[0]))
        ]
        began = self.clock.now()
        call = self.engine.submit(0, "alone", self.prompts.columns, requests, self.actors.rollout._sampling)
        seconds, tokens = ray.get(call.ref)
        if self.clock.cpu:
            seconds = self.clock.now() - began
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
            began = self.clock.now()
            seconds, _ = ray.get(self.peer.step.remote(pointers, advantages, weights, parts))
            found.torch[name] = self.clock.now() - began if self.clock.cpu else seconds

    def has_lost(self, name: str) -> bool:
        """Whether a peer was so much slower than the other that it cannot become the faster."""
        if max(t.length for t in self.last[0]) * len(self.lengths) > ONE_BATCH:
            return True
        past = [m.torch for m in self.measured if name in m.torch]
        return bool(past) and all(t[name] > HOPELESS * t["micro-batches"] for t in past)


def lengths_of(shape: str, count: int) -> list[int]:
    """Completion lengths, tokens."""
    given = shape.partition("/")[2]
    return long_tailed(count, MEAN, LONGEST) if given == TAIL else [int(given)] * count


def system_of(model: Path, tokens: int, user: str) -> str:
    """A system prompt with which a question becomes a prompt of so many tokens."""
    chat = ChatTemplate.of(load_tokenizer(str(model)))
    words, system = SYSTEM.split(), ""
    for number in range(tokens):
        longer = f"{system} {words[number % len(words)]}".strip()
        turns = [Message("system", longer), Message("user", user)]
        text = chat.render(turns, generation_prompt=True)
        if len(chat.tokenizer.encode(text, add_special_tokens=False)) > tokens:
            break
        system = longer
    return system


def write_prompts(source: Path, system: str, path: Path) -> Path:
    """The rows of `source` as TRL takes them."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    first = {"role": "system", "content": system}
    path.write_text("".join(json.dumps({"prompt": [first, *row["messages"]]}) + "\n" for row in rows))
    return path


def start_trl(
    options: argparse.Namespace, model: Path, prompts: Path, lengths: Sequence[int], scratch: Path
) -> trl.Trl | None:
    """TRL, ready to take a step; None where there is none."""
    python, missing = trl.python_of(options)
    if missing:
        print(f"TRL is left out: {missing}")
        return None
    threads = 1 if options.cpu_seconds else len(os.sched_getaffinity(0))
    told = scratch / "lengths.json"
    told.write_text(json.dumps(list(lengths)))
    flags = {
        "model": model, "data": prompts, "lengths": told, "threads": threads,
        "prompts": options.prompts, "generations": options.generations,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    peer = trl.Trl(python, "trl_grpo.py", words, threads, scratch / "trl.log", options.cpu_seconds)
    peer.answer()
    return peer


def measure(options: argparse.Namespace, shape: str, clock: Clock, scratch: Path) -> list[Measured]:
    """Runs the product's pipeline with the measuring loop and the forced lengths put in."""
    count, prompt = options.prompts * options.generations, int(shape.partition("/")[0])
    lengths = lengths_of(shape, count)
    model = make_tiny_model(scratch / "model", max_position=max(1024, prompt + LONGEST))
    data = write_dataset(scratch / "data").train
    question = json.loads(data.read_text().splitlines()[0])["messages"][-1]["content"]
    system = system_of(model, prompt, question)
    config = RLHFConfig(
        model=str(model),
        dataset=str(data),
        system=system,
        reward_funcs=("accuracy", "format"),
        train_type="full",
        beta=0.0,
        num_generations=options.generations,
        per_device_train_batch_size=count,
        max_completion_length=max(lengths),
        max_length=prompt + 64,
        max_steps=options.rounds + options.warmup,
        learning_rate=1e-6,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
        prefix_sharing=options.prefix_sharing,
        output_dir=str(scratch / "output"),
    )
    prompts = write_prompts(data, system, scratch / "prompts.jsonl")
    MeasuredRun.options, MeasuredRun.clock, MeasuredRun.lengths = options, clock, lengths
    MeasuredRun.trl = start_trl(options, model, prompts, lengths, scratch)
    MeasuredRun.measured = []
    with (
        mock.patch.object(online, "OnlineRun", MeasuredRun),
        mock.patch.object(start, "RolloutWorker", ForcedRolloutWorker),
    ):
        online.run(config)
    if MeasuredRun.trl is not None:
        MeasuredRun.trl.close()
    return MeasuredRun.measured


def table(measured: dict[str, list[Measured]], markdown: bool) -> str:
    """One row a shape."""
    header = ["shape", "step", "b vLLM", "c torch", "step/(b+c)", "min-max", "TRL", "step/TRL", "min-max"]
    header += ["TRL's generate, CPU-s", *PHASES, "other", "c was cut in"]
    rows = []
    for shape, rounds in measured.items():
        peers = {name: median(m.torch[name] for m in rounds if name in m.torch) for name in rounds[0].torch}
        best = min(peers, key=peers.__getitem__)
        ratios = [m.step / (m.vllm + m.torch[best]) for m in rounds if best in m.torch]
        times = [median(m.step for m in rounds), median(m.vllm for m in rounds), peers[best]]
        trls = [m.step / m.trl for m in rounds]
        split = [median(m.phases[p] for m in rounds) for p in PHASES] + [median(m.other for m in rounds)]
        others = ", ".join(f"{name} {peers[name]:.2f}" for name in peers if name != best)
        rows.append(
            [
                shape,
                *(f"{t:.2f}" for t in times),
                f"{median(ratios):.2f}",
                spread(ratios),
                f"{median(m.trl for m in rounds):.2f}",
                f"{median(trls):.2f}",
                spread(trls),
                f"{median(m.trl_generate for m in rounds):.2f}",
                *(f"{t:.3f}" for t in split),
                f"{best} ({others})" if others else best,
            ]
        )
    return render(header, rows, markdown)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
        choices=SHAPES,
        default=list(SHAPES),
        help="tokens of prompt and completion; tail: log-normal lengths, mean 64, at most 512 (default: all)",
    )
    parser.add_argument(
        "--max_tokens_per_micro_batch",
        type=int,
        default=None,
        help="as in raytune-rl; default: the product's",
    )
    parser.add_argument(
        "--prefix_sharing", default="auto", choices=("auto", "true", "false"), help="as in raytune-rl"
    )
    trl.add_flags(parser)
    add_flag(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    measured = {}
    with measuring(options) as clock:
        for shape in options.shapes:
            with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
                measured[shape] = measure(options, shape, clock, Path(scratch))
    count = options.prompts * options.generations
    print(f"\nGRPO step, {count} completions, {clock.unit} (medians of {options.rounds} rounds)")
    print(machine() + "\n")
    print(table(measured, options.markdown))


if __name__ == "__main__":
    main()
