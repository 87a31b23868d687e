"""Tokens a second of our SFT beside a bare PyTorch loop and TRL's SFTTrainer, on equal and on ragged rows.

One run measures, on the same model, rows, threads and number type (float32):

  ours      the pipeline itself, unpacked and packed; one policy worker
  bare      a plain PyTorch loop on the very rows of each of our steps, one padded batch a step, in turns with
            ours, so that a busy neighbour disturbs both alike
  TRL       SFTTrainer on the same file, with its defaults and with our batch and number type, in an
            environment of its own under .cache; left out with a line where it cannot be installed

and prints tokens a second (those of the rows, padding not counted) and the ratios. Figures are medians over
steps. Nothing else is downloaded: the model is the 2.5 M-parameter one of raytune_rl.tiny.
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
from collections import defaultdict
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


@dataclass(frozen=True)
class Step:
    """One step: tokens of its rows, and seconds of us and of the bare loop."""

    tokens: int
    ours: float
    bare: float


class MeasuredSFT(offline.OfflineRun):
    """The product's loop; after each step the peer does the same work. No checkpoint is written."""

    warmup: ClassVar[int]
    measured: ClassVar[list[Step]]

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
            if self.run.step > self.warmup:
                self.measured.append(Step(sum(lengths), ours, bare))


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


def ours(options: argparse.Namespace, model: Path, data: Path, output: Path, packing: bool) -> list[Step]:
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
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return told[-1] if told else str(error)
    return None


def trl(options: argparse.Namespace, model: Path, data: Path, threads: int, *flags: str) -> list[float]:
    """Tokens a second of each measured step of TRL."""
    words = ["--model", str(model), "--data", str(data), "--steps", str(options.steps + options.warmup)]
    words += ["--threads", str(threads), *flags]
    # Not as a module of this folder, and without our environment's packages.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [str(TRL_PYTHON), str(ROOT / "benchmarks" / "peers" / "trl_sft.py"), *words],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"TRL failed:\n{done.stderr[-2000:]}")
    steps = json.loads(done.stdout.strip().splitlines()[-1])["steps"]
    return [tokens / seconds for tokens, seconds in steps[options.warmup :]]


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """By shape of the rows and by what ran: rates, and for ours the ratios to the bare loop."""
    model = make_tiny_model(scratch / "model")
    threads = len(os.sched_getaffinity(0))
    missing = "not asked for" if options.no_trl else install_trl()
    if missing:
        print(f"TRL is left out: {missing}")
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for shape in ("equal", "ragged"):
        data = write_rows(scratch / f"{shape}.jsonl", shape, 64 * options.rows)
        for name, packing in (("ours", False), ("ours, packed", True)):
            steps = ours(options, model, data, scratch / "output", packing)
            found[shape][name] = [s.tokens / s.ours for s in steps]
            found[shape][f"{name} / bare"] = [s.bare / s.ours for s in steps]
            if not packing:
                found[shape]["bare loop"] = [s.tokens / s.bare for s in steps]
        if not missing:
            found[shape]["TRL, its defaults"] = trl(options, model, data, threads)
            same = ("--plain", "--rows", str(options.rows))
            found[shape]["TRL, our batch, float32"] = trl(options, model, data, threads, *same)
    return found


def table(found: dict[str, dict[str, Any]], markdown: bool) -> str:
    """One row for what ran on each shape."""
    header = ["rows", "what", "tokens/s", "min-max", "of the bare loop"]
    rows = []
    for shape, measured in found.items():
        bare = median(measured["bare loop"])
        for name, rates in measured.items():
            if name.endswith("/ bare"):
                continue
            ratio = median(measured.get(f"{name} / bare", [median(rates) / bare]))
            rows.append(
                [shape, name, f"{median(rates):,.0f}", spread([r / 1000 for r in rates]), f"{ratio:.2f}"]
            )
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
    print(f"\nSFT, {options.rows} rows a step, float32 (medians of {options.steps} steps)")
    print(f"{machine()}, {load:.1f} at the start\n")
    print(table(found, options.markdown))
    for shape, measured in found.items():
        if "TRL, its defaults" in measured:
            best = max(median(measured["ours"]), median(measured["ours, packed"]))
            print(f"{shape}: ours / TRL's defaults {best / median(measured['TRL, its defaults']):.2f}")


if __name__ == "__main__":
    main()
