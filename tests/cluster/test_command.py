"""The command as a user runs it: interrupted, resumed, and given bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_rl import cli
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
COMMAND = str(Path(sys.executable).parent / "raytune-rl")
ENVIRON = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "HF_HUB_OFFLINE": "1"}


def words(tiny: Tiny, output: Path, steps: int) -> list[str]:
    return [
        "sft", "--model", str(tiny.tied), "--dataset", str(tiny.data.sft), "--train_type", "full",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", str(steps),
        "--logging_steps", "1", "--output_dir", str(output), "--learning_rate", "1e-3",
    ]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return {int(x["global_step/max_steps"].split("/")[0]): x["loss"] for x in lines if "loss" in x}


def test_ctrl_c_saves_and_resuming_repeats_what_would_have_been(
    cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    """64 rows, 8 a step: 8 steps an epoch. The stop falls where it falls, also in the middle of an epoch."""
    steps = 60
    interrupted = tmp_path / "interrupted"
    process = subprocess.Popen(
        [COMMAND, *words(tiny, interrupted, steps)],
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    deadline = time.monotonic() + 240
    for line in process.stdout:
        said += line
        if line.startswith("step 3/") and said.count("step 3/") == 1:
            process.send_signal(signal.SIGINT)
        assert time.monotonic() < deadline, said
    assert process.wait(30) == 130, said
    assert "Stopping: the present step is finished and saved first" in said
    assert "interrupted" in said
    assert said.count("step 3/") == 1
    assert "--resume_from_checkpoint" in said
    assert "Traceback" not in said
    (run,) = interrupted.iterdir()
    (checkpoint,) = run.glob("checkpoint-*")
    stopped = int(checkpoint.name.rpartition("-")[2])
    assert 3 <= stopped < steps
    before = losses(run)
    assert sorted(before) == list(range(1, stopped + 1))

    assert cli.main([*words(tiny, interrupted, steps), "--resume_from_checkpoint", "auto"]) == 0
    assert [p.name for p in interrupted.iterdir()] == [run.name], "it goes on in its own directory"
    whole = losses(run)
    assert sorted(whole) == list(range(1, steps + 1))
    assert {step: whole[step] for step in before} == before

    straight = tmp_path / "straight"
    assert cli.main(words(tiny, straight, steps)) == 0
    (other,) = straight.iterdir()
    assert losses(other) == whole, "as if it had never been stopped"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--learning_rat", "1e-3"], 2, "--learning_rate"),
        (["--dataset", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--resume_from_checkpoint", "no/such/checkpoint"], 1, "no/such/checkpoint"),
    ],
)
def test_a_users_mistake_is_answered_without_a_traceback(
    cluster: None,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    assert cli.main([*words(tiny, tmp_path, 1), *flags]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.out + said.err


def of_mark(mark: str) -> list[str]:
    """Command lines of the living processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_sigterm_before_training_ends_everything_in_order(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, *words(tiny, tmp_path / "out", 5)],
        env={**ENVIRON, "MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("starting the actors"):
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, said
    assert said.endswith("raytune-rl: interrupted\n"), said
    assert "Traceback" not in said
    assert "***" not in said
    deadline = time.monotonic() + 30
    while left := of_mark(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    (run,) = (tmp_path / "out").iterdir()
    assert not (run / "run.lock").exists()
