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
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import ray

from benchmarks.bare_sft import BareSFT
from benchmarks.table import machine, median, render, spread
from raytune_rl.config import SFTConfig
from raytune_rl.pipelines import offline, offline_report, sft
from raytune_rl.tiny.model import make_tiny_model

TRL = "trl==1.16.0"
PINNED = ("torch", "transformers", "accelerate", "datasets")
ROOT = Path(__file__).parents[1]
TRL_PYTHON = ROOT / ".cache" / "trl" / "bin" / "python"


BARE, DEFAULTS, SAME = "bare loop", "TRL, its defaults", "TRL, our batch, float32"


@dataclass(frozen=True)
class Turn:
    """One step of each: tokens of rows a second."""

    ours: float
    peers: dict[str, float]


class Trl:
    """TRL in a process of its own, which takes a step when it is told to.

    Args:
        flags: Of `peers/trl_sft.py`.
        threads: Of torch.
        errors: File for what it prints.
    """

    def __init__(self, flags: Sequence[str], threads: int, errors: Path) -> None:
        # Not as a module of this folder, and without our environment's packages.
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._errors = errors
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [str(TRL_PYTHON), str(ROOT / "benchmarks" / "peers" / "trl_sft.py"), *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environ | {"OMP_NUM_THREADS": str(threads)},
            )

    def answer(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"TRL failed:\n{self._errors.read_text()[-2000:]}")
        return dict(json.loads(line))

    def step(self) -> float:
        """Takes a step; tokens of rows a second."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        done = self.answer()
        return float(done["tokens"] / done["seconds"])

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class MeasuredSFT(offline.OfflineRun):
    """The product's loop; after each step the peers have their turn. No checkpoint is written."""

    warmup: ClassVar[int]
    trl: ClassVar[dict[str, Trl]]
    measured: ClassVar[list[Turn]]

    def train(self) -> None:
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
            began = time.perf_counter()
            self.train_step(batch)
            ours = time.perf_counter() - began
            pointers, lengths, *_ = self.batch(self.rows, batch)
            bare, _ = ray.get(self.peer.step.remote(pointers))
            peers = {BARE: sum(lengths) / bare} | {name: peer.step() for name, peer in self.trl.items()}
            if self.run.step > self.warmup:
                self.measured.append(Turn(sum(lengths) / ours, peers))


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


def install_trl() -> str | None:
    """Makes TRL's environment unless it is there. Returns why not, or None."""
    from importlib.metadata import version

    if TRL_PYTHON.is_file():
        return None
    here = ROOT / ".cache" / "uv" / "bin" / "uv"
    uv = str(here) if here.is_file() else "uv"
    same = [f"{name}=={version(name)}" for name in PINNED]
    try:
        subprocess.run(
            [uv, "venv", "--quiet", "--python", sys.executable, str(TRL_PYTHON.parents[1])], check=True
        )
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", str(TRL_PYTHON), TRL, *same],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return lines[-1] if lines else str(error)
    return None


def start_trl(options: argparse.Namespace, model: Path, data: Path, threads: int) -> dict[str, Trl]:
    """TRL with its defaults and with our settings, both ready to take a step."""
    words = ["--model", str(model), "--data", str(data), "--threads", str(threads)]
    flags = {DEFAULTS: words, SAME: [*words, "--plain", "--rows", str(options.rows)]}
    started = {
        name: Trl(given, threads, data.with_suffix(f".{number}.log"))
        for number, (name, given) in enumerate(flags.items())
    }
    for peer in started.values():
        peer.answer()
    return started


def measure(options: argparse.Namespace, scratch: Path) -> dict[tuple[str, str], list[Turn]]:
    """The turns, by shape of the rows and by how ours ran."""
    model = make_tiny_model(scratch / "model")
    threads = len(os.sched_getaffinity(0))
    missing = "not asked for" if options.no_trl else install_trl()
    if missing:
        print(f"TRL is left out: {missing}")
    found: dict[tuple[str, str], list[Turn]] = {}
    for shape in ("equal", "ragged"):
        data = write_rows(scratch / f"{shape}.jsonl", shape, 64 * options.rows)
        MeasuredSFT.trl = {} if missing else start_trl(options, model, data, threads)
        for name, packing in (("unpacked", False), ("packed", True)):
            found[shape, name] = run(options, model, data, scratch / "output", packing)
        for peer in MeasuredSFT.trl.values():
            peer.close()
    return found


def table(found: dict[tuple[str, str], list[Turn]], markdown: bool) -> str:
    """One row for each way ours ran on each shape."""
    peers = list(next(iter(found.values()))[0].peers)
    header = ["rows", "ours", "tokens/s"]
    for peer in peers:
        header += [f"{peer}: tokens/s", "ours / it", "min-max"]
    rows = []
    for (shape, name), turns in found.items():
        row = [shape, name, f"{median(t.ours for t in turns):,.0f}"]
        for peer in peers:
            ratios = [t.ours / t.peers[peer] for t in turns]
            row += [f"{median(t.peers[peer] for t in turns):,.0f}", f"{median(ratios):.2f}", spread(ratios)]
        rows.append(row)
    return render(header, rows, markdown)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/sft_throughput.py",
    )
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (default 16)")
    parser.add_argument("--no_trl", action="store_true", help="leave TRL out")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
        found = measure(options, Path(scratch))
    print(f"\nSFT, {options.rows} rows a step, float32 (medians of {options.steps} turns)")
    print(f"{machine()}, {load:.1f} at the start\n")
    print(table(found, options.markdown))


if __name__ == "__main__":
    main()
