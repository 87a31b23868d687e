"""CPU-seconds from the shell to the first optimizer step of a tiny GRPO run, by process; and of `--help`.

Each run is `raytune-rl rlhf` in a process of its own, on one core with one thread a worker, and is ended when
it says that its first step is done. Several trees, each with a Python that imports it, run in turns.

    python benchmarks/start.py --trees .venv/bin/python /elsewhere/.venv/bin/python
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.clock import Clock, measuring
from benchmarks.table import machine, median, render, spread
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model

LOOK_S = 0.2
"""Between two looks at the processes; what a process takes after the last of its life is not seen."""
TOTAL, WALL, HELP = "all", "wall s", "--help"
COMMAND = "from raytune_rl.cli import main; raise SystemExit(main())"


def start(python: str, scratch: Path) -> dict[str, float]:
    """CPU-seconds by process until the first step is done, and in all; and the wall's."""
    words = [python, "-c", COMMAND, "rlhf"]
    flags = {
        "model": scratch / "model", "dataset": scratch / "data" / "train.jsonl",
        "reward_funcs": "accuracy", "train_type": "full", "num_generations": 8,
        "per_device_train_batch_size": 32, "max_completion_length": 32, "max_steps": 2, "logging_steps": 1,
        "output_dir": scratch / "output", "report_to": "none",
    }  # fmt: skip
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    said = scratch / "said"
    began = time.perf_counter()
    with said.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=scratch)
    clock = Clock(cpu=True, root=process.pid)
    while process.poll() is None and "step 1/" not in said.read_text():
        found = clock.by_process()
        time.sleep(LOOK_S)
    if "step 1/" not in said.read_text():
        raise SystemExit(f"{python} did not come to a step:\n{said.read_text()[-3000:]}")
    found = clock.by_process()
    wall = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    return found | {TOTAL: sum(found.values()), WALL: wall}


def help_seconds(python: str) -> float:
    """CPU-seconds of `raytune-rl rlhf --help`."""
    before = os.times()
    subprocess.run([python, "-c", COMMAND, "rlhf", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/start.py",
    )
    parser.add_argument("--trees", nargs="+", default=[sys.executable], help="a Python of each tree")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each, after a first one (default 3)")
    parser.add_argument("--least", type=float, default=0.5, help="CPU-s of a process with a line of its own")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    options.cpu_seconds = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python compiles a program once
    trees = [str(Path(python).absolute()) for python in options.trees]
    found: dict[str, list[dict[str, float]]] = {python: [] for python in trees}
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as folder, measuring(options):
        scratch = Path(folder)
        os.environ["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")
        make_tiny_model(scratch / "model")
        write_dataset(scratch / "data")
        for number in range(1 + options.rounds):
            for python, starts in found.items():
                measured = start(python, scratch) | {HELP: help_seconds(python)}
                if number:  # the first start of each writes its bytecode
                    starts.append(measured)
    names = {name: None for starts in found.values() for one in starts for name in one}
    rows = []
    for name in (*(n for n in names if n not in (TOTAL, WALL, HELP)), TOTAL, HELP, WALL):
        every = [[one.get(name, 0.0) for one in starts] for starts in found.values()]
        if max(max(values) for values in every) < options.least and name not in (TOTAL, WALL, HELP):
            continue
        cells = [cell for values in every for cell in (f"{median(values):.2f}", spread(values))]
        ratios = [first / last for first, last in zip(every[0], every[-1], strict=True) if last]
        rows.append([name, *cells, f"{median(ratios):.2f}"])
    header = ["process"]
    for number in range(len(found)):
        header += [f"tree {number + 1}", "min-max"]
    print("\nCPU-seconds to the first optimizer step")
    print(machine() + "\n")
    print(render([*header, "first / last"], rows, options.markdown))


if __name__ == "__main__":
    main()
