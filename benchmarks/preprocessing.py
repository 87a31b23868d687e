"""Rows a second and peak memory of reading, understanding and tokenizing chats, by the run's own data task.

Each line is a process of its own on a file of so many rows: all at once, with one or more processes, and as
`--streaming true` does it, window after window. Memory is the peak over what the imports and the tokenizer
take, and beside it the size of the rows on disk, or of a window. It is flat: of each row some numbers stay
(its length, its place), not its tokens. `again` is how long the same takes when it was done before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock
from benchmarks.table import machine, render
from raytune_rl.config import SFTConfig
from raytune_rl.tiny.model import make_tiny_model

WINDOW = 1000
"""Rows of a window: the default of --shuffle_buffer_size."""
WORDS = """the model answers with words of a plain text
that a tokenizer cuts in pieces one seven nine""".split()  # noqa: SIM905


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Chats of one turn with some 40 words, log-normal, at most 200."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            size = max(4, min(200, int(rng.lognormvariate(3.2, 0.8))))
            question, answer = " ".join(rng.choices(WORDS, k=12)), " ".join(rng.choices(WORDS, k=size))
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}) + "\n")


def encode(model: str, data: str, processes: int) -> dict[str, float]:
    """The measurements of one process."""
    from raytune_rl.models.load import load_tokenizer
    from raytune_rl.prepare.facts import model_facts

    clock = Clock(cpu=True)
    config = SFTConfig(model=model, dataset=data, dataset_num_proc=max(processes, 1))
    tokenizer = load_tokenizer(model)
    model_facts(config)
    before, cpu = _peak(resource.RUSAGE_SELF), clock.now()
    if not processes:
        return stream(data, tokenizer, before, time.perf_counter()) | {"cpu": clock.now() - cpu}
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as cache:
        seconds, lengths = _task(config, cache)
        cpu = clock.now() - cpu
        again, _ = _task(config, cache)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*.npy"))
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "seconds": seconds,
        "cpu": cpu,
        "again": again,
        "peak": _peak(resource.RUSAGE_SELF) - before,
        "result": size / 2**20,
    }


def _task(config: SFTConfig, cache: str) -> tuple[float, Any]:
    """Seconds of the data task, and the lengths that it gives, tokens."""
    from raytune_rl.prepare.places import MediaPlaces
    from raytune_rl.prepare.task import encode_rows_task

    began = time.perf_counter()
    quarantine = str(Path(cache).parent / "quarantine.jsonl")
    items = encode_rows_task(config, "sft", quarantine, MediaPlaces.of(config, True), cache)
    lengths, *_ = next(item for item in items if not isinstance(item, str))
    return time.perf_counter() - began, lengths


def stream(data: str, tokenizer: Any, before: float, began: float) -> dict[str, float]:
    """The same rows in windows; the last is cut where the file ends."""
    from raytune_rl.data.encode import encode_sft
    from raytune_rl.data.stream import RowWindows

    with Path(data).open("rb") as file:
        total = sum(1 for _ in file)
    windows = RowWindows([data], task="sft", size=WINDOW)
    rows = tokens = 0
    result = 0.0
    for number in range(-(-total // WINDOW)):
        examples = windows.window(number).examples[: total - rows]
        found = encode_sft(examples, tokenizer)
        rows, tokens = rows + len(found.tokens), tokens + len(found.tokens.values)
        result = max(result, float(found.tokens.values.nbytes + found.loss_mask.values.nbytes))
    seconds, peak = time.perf_counter() - began, _peak(resource.RUSAGE_SELF) - before
    return {"rows": rows, "tokens": tokens, "seconds": seconds, "peak": peak, "result": result / 2**20}


def _peak(who: int) -> float:
    """Peak resident memory, MiB."""
    return resource.getrusage(who).ru_maxrss / 2**10


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/preprocessing.py",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 100_000], help="files to make")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, cores], help="--dataset_num_proc")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.child:
        model, data, processes = options.child
        print(json.dumps(encode(model, data, int(processes))))
        return
    lines = []
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        for rows in options.rows:
            data = Path(scratch) / f"{rows}.jsonl"
            write_rows(data, rows)
            for processes in (*dict.fromkeys(options.processes), 0):
                words = [sys.executable, __file__, "--child", str(model), str(data), str(processes)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                lines.append(
                    [
                        f"{rows:,}",
                        str(processes or "stream"),
                        f"{found['rows'] / found['seconds']:,.0f}",
                        f"{found['tokens'] / found['seconds']:,.0f}",
                        f"{found['rows'] / found['cpu']:,.0f}",
                        f"{found['again']:.1f}" if "again" in found else "",
                        f"{found['peak']:,.0f}",
                        f"{found['result']:,.0f}",
                    ]
                )
    header = ["rows", "processes", "rows/s", "tokens/s", "rows/CPU-s", "again s", "peak MiB", "result MiB"]
    print("\nSFT rows to tokens (memory of worker processes not counted)")
    print(machine() + "\n")
    print(render(header, lines, options.markdown))


if __name__ == "__main__":
    main()
