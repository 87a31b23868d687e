"""Tokens a second of our SFT beside a bare PyTorch loop and TRL's SFTTrainer, on equal and on ragged rows.

One run measures, on the same model, rows, threads and number type (float32):

  ours      the pipeline itself, unpacked and packed; one policy worker
  bare      a plain PyTorch loop on the very rows of each of our steps, one padded batch a step
  TRL       SFTTrainer on the same file, with its defaults and with our batch and number type, in an
            environment of its own under .cache; left out with a line where it cannot be installed

All take their steps in turns, one after another, each in a process that is started and warm before, so that a
busy neighbour disturbs all alike. It prints tokens a second (those of the rows, padding not counted) and what
ours are of each peer's: medians over steps, of the ratios the medians of the turns' own ratios. Nothing else
is downloaded: the model is the 2.5 M-parameter one of raytune_rl.tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import ray

from benchmarks import trl
from benchmarks.bare_sft import BareSFT
from benchmarks.clock import Clock, add_flag, measuring
from benchmarks.table import machine, median, render, spread
from raytune_rl.config import SFTConfig
from raytune_rl.pipelines import offline, offline_report, sft
from raytune_rl.pipelines.rescue import Rescue
from raytune_rl.tiny.model import make_tiny_model

BARE, DEFAULTS, SAME = "bare loop", "TRL, its defaults", "TRL, our batch, float32"


@dataclass(frozen=True)
class Turn:
    """One step of each: tokens of rows a second, or a CPU-second."""

    ours: float
    peers: dict[str, float]


class MeasuredSFT(offline.OfflineRun):
    """The product's loop; after each step the peers have their turn. No checkpoint is written."""

    warmup: ClassVar[int]
    clock: ClassVar[Clock]
    trl: ClassVar[dict[str, trl.Trl]]
    measured: ClassVar[list[Turn]]

    def train(self, rescue: Rescue) -> None:
        threads = str(self.groups.threads["policy"])
        self.peer = (
            ray.remote(BareSFT)
            .options(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}})
            .remote(self.config.model, 1e-5)
        )
        MeasuredSFT.measured = []
        self.run.timer.finish()
        while self.run.step < self.schedule.total_steps:
            batch = self.order.batch(self.run.step)
            began = self.clock.now()
            self.train_step(batch)
            ours = self.clock.now() - began
            done = self.batch(self.rows, batch)
            tokens = int(done.lengths.sum())
            began = self.clock.now()
            bare, _ = ray.get(self.peer.step.remote(done.rows))
            if self.clock.cpu:
                bare = self.clock.now() - began
            peers = {BARE: tokens / bare}
            for name, peer in self.trl.items():
                said = peer.step()
                peers[name] = said["tokens"] / said["seconds"]
            if self.run.step > self.warmup:
                self.measured.append(Turn(tokens / ours, peers))


def write_rows(path: Path, shape: str, rows: int, seed: int = 0) -> Path:
    """Chats whose answers are digits: about one token each. Equal: 100. Ragged: log-normal, mean 100."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            size = 100 if shape == "equal" else max(4, min(800, int(rng.lognormvariate(4.1, 1.0))))
            answer = "".join(rng.choice("0123456789") for _ in range(size))
            chat = [{"role": "user", "content": "Write digits."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


def run(options: argparse.Namespace, model: Path, data: Path, output: Path, packing: bool) -> list[Turn]:
    """Runs the product's pipeline with the measuring loop put in."""
    length = 1024
    config = SFTConfig(
        model=str(model),
        dataset=str(data),
        train_type="full",
        packing=packing,
        max_length=length,
        # A pack holds as many tokens as 16 rows on average do.
        per_device_train_batch_size=2 if packing else options.rows,
        gradient_accumulation_steps=1,
        max_steps=options.steps + options.warmup,
        learning_rate=1e-5,
        output_dir=str(output),
        report_to="none",
    )
    MeasuredSFT.warmup = options.warmup
    with (
        mock.patch.object(offline, "OfflineRun", MeasuredSFT),
        mock.patch.object(offline_report, "summary_of"),
    ):
        sft.run(config)
    return MeasuredSFT.measured


def start_trl(
    options: argparse.Namespace, python: Path, model: Path, data: Path, threads: int
) -> dict[str, trl.Trl]:
    """TRL with its defaults and with our settings, both ready to take a step."""
    words = ["--model", str(model), "--data", str(data), "--threads", str(threads)]
    flags = {DEFAULTS: words, SAME: [*words, "--plain", "--rows", str(options.rows)]}
    started = {
        name: trl.Trl(
            python, "trl_sft.py", given, threads, data.with_suffix(f".{number}.log"), options.cpu_seconds
        )
        for number, (name, given) in enumerate(flags.items())
    }
    for peer in started.values():
        peer.answer()
    return started


def measure(options: argparse.Namespace, scratch: Path) -> dict[tuple[str, str], list[Turn]]:
    """The turns, by shape of the rows and by how ours ran."""
    model = make_tiny_model(scratch / "model")
    threads = len(os.sched_getaffinity(0))
    python, missing = trl.python_of(options)
    if missing:
        print(f"TRL is left out: {missing}")
    found: dict[tuple[str, str], list[Turn]] = {}
    for shape in ("equal", "ragged"):
        data = write_rows(scratch / f"{shape}.jsonl", shape, 64 * options.rows)
        MeasuredSFT.trl = {} if missing else start_trl(options, python, model, data, threads)
        for name, packing in (("unpacked", False), ("packed", True)):
            found[shape, name] = run(options, model, data, scratch / "output", packing)
        for peer in MeasuredSFT.trl.values():
            peer.close()
    return found


def table(found: dict[tuple[str, str], list[Turn]], markdown: bool) -> str:
    """One row for each way ours ran on each shape."""
    peers = list(next(iter(found.values()))[0].peers)
    header = ["rows", "ours", f"tokens/{MeasuredSFT.clock.unit}"]
    for peer in peers:
        header += [f"{peer}: the same", "ours / it", "min-max"]
    rows = []
    for (shape, name), turns in found.items():
        row = [shape, name, f"{median(t.ours for t in turns):,.0f}"]
        for peer in peers:
            ratios = [t.ours / t.peers[peer] for t in turns]
            row += [f"{median(t.peers[peer] for t in turns):,.0f}", f"{median(ratios):.2f}", spread(ratios)]
        rows.append(row)
    return render(header, rows, markdown)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/sft_throughput.py",
    )
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (default 16)")
    trl.add_flags(parser)
    add_flag(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch,
        measuring(options) as MeasuredSFT.clock,
    ):
        found = measure(options, Path(scratch))
    unit = MeasuredSFT.clock.unit
    print(f"\nSFT, {options.rows} rows a step, float32, tokens by {unit} (medians of {options.steps} turns)")
    print(f"{machine()}, {load:.1f} at the start\n")
    print(table(found, options.markdown))


if __name__ == "__main__":
    main()
