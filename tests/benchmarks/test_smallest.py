"""Every benchmark and example: that it can be imported and takes its flags; and that it runs at its smallest
size, what takes more than seconds by `make bench-smallest` only.
"""

from __future__ import annotations

import importlib
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALLEST = {
    "async_overlap": "--steps 2 --staleness 0 1 --token_s 0.004",
    "controller": "--groups 200 --rounds 1 --members 10",
    "gpu": "--shape tiny --tokens 128 --row 64 --steps 2",
    "grpo_step": "--rounds 1 --warmup 1 --prompts 2 --generations 2 --shapes 46/64 --no_trl --cpu_seconds",
    "prefix_sharing": "--shapes 46/64 --prompts 1 --rounds 1",
    "preprocessing": "--rows 500 --processes 1",
    "recovery": "--roles 'reward worker' --steps 5 --hidden 128",
    "sft_throughput": "--steps 1 --warmup 1 --rows 4 --no_trl --cpu_seconds",
    "start": "--rounds 1",
    "weight_sync": "--megabytes 1 --rounds 2",
}
"""By program, its flags for the smallest run."""
QUICK = {"async_overlap", "controller", "prefix_sharing"}
"""Programs whose smallest runs take seconds."""
PARTS = {"bare_loop", "bare_sft", "clock", "flops", "forced_rollout", "scripted", "table", "trl"}
"""Files that are no programs."""
EXAMPLES = {
    "dpo": "dpo.py --max_steps 1",
    "grpo": "grpo.py --max_steps 1",
    "ppo": "ppo.py --max_steps 1",
    "sft": "sft.py --max_steps 1",
    "multi_turn": "grpo.py --max_steps 1 --external_plugins {examples}/multi_turn.py "
    "--multi_turn_scheduler calculator --max_turns 2",
    "loss_plugin": "grpo.py --max_steps 1 --external_plugins {examples}/loss_plugin.py --loss_type power",
    "credit_plugin": "grpo.py --max_steps 1 --external_plugins {examples}/credit_plugin.py "
    "--advantage_estimator median",
    "plugin": "grpo.py --max_steps 1 --external_plugins {examples}/plugin.py --reward_funcs external_r1v_acc",
    "demo": "demo.py",
}
"""By example, the command that runs it."""
ELSEWHERE = {"judge", "demo_real"}
"""Examples that are run by tests of their own, or fetch a model."""
PROGRAMS = sorted({command.split()[0] for command in EXAMPLES.values()})


def test_every_benchmark_can_be_imported_and_takes_the_flags_of_its_smallest_run() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == SMALLEST.keys() | PARTS
    for name in PARTS:
        importlib.import_module(f"benchmarks.{name}")
    for name, flags in SMALLEST.items():
        program = importlib.import_module(f"benchmarks.{name}")
        assert callable(program.main)
        assert program.parse(shlex.split(flags)) is not None


def test_every_example_that_is_a_program_can_be_imported() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == EXAMPLES.keys() | ELSEWHERE
    for name in PROGRAMS:
        runpy.run_path(str(ROOT / "examples" / name), run_name=name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.bench) for name in SMALLEST]
)
def test_a_benchmark_runs_at_its_smallest_size(name: str, tmp_path: Path) -> None:
    run(ROOT / "benchmarks" / f"{name}.py", SMALLEST[name], tmp_path)


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_for_a_step(name: str, tmp_path: Path) -> None:
    program, _, flags = EXAMPLES[name].format(examples=ROOT / "examples").partition(" ")
    run(ROOT / "examples" / program, flags, tmp_path)


def run(program: Path, flags: str, folder: Path) -> None:
    """Runs it in a folder of its own; it must end well."""
    done = subprocess.run(
        [sys.executable, str(program), *shlex.split(flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
