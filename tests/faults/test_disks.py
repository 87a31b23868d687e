"""A disk fills at checkpoints, and an object store at weights or snapshots: the run says so and goes on where
that is safe; what it leaves is whole, and what it comes to is what an undisturbed run comes to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import CheckpointError
from raytune_rl.pipelines import online
from raytune_rl.pipelines.lifecycle import Run, RunResult
from raytune_rl.tracking.checkpoints import list_checkpoints
from raytune_rl.tracking.run_dir import RunDir
from tests.cluster.conftest import Tiny
from tests.disks import full, small_disk
from tests.faults.runs import GRPO, Outcome, assert_same, outcome, small
from tests.faults.strikes import assert_nothing_left, left

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]


def names(run_dir: Path) -> list[str]:
    """Of the whole checkpoints."""
    return [path.name for path in list_checkpoints(RunDir(run_dir))]


def test_a_disk_that_fills_costs_the_checkpoints_that_did_not_fit(
    tiny: Tiny, tmp_path: Path, undisturbed_grpo: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    before, plain = left(), Run.save
    disk = tmp_path / "out"
    disk.mkdir()

    def save(run: Run, *args: Any) -> Path | None:
        with full(disk, 64) if run.step in (2, 4) else nullcontext():
            return plain(run, *args)

    settings = small(tiny, tmp_path, **{**GRPO, "save_steps": 1, "resume_from_checkpoint": "auto"})
    with small_disk(disk, 512 * 1024):
        with (
            mock.patch.object(Run, "save", partialmethod(save)),
            pytest.raises(CheckpointError, match=r"checkpoint-4.*No space left on device"),
        ):
            online.run(RLHFConfig(**settings))
        said = capsys.readouterr()
        (run_dir,) = disk.iterdir()
        assert names(run_dir) == ["checkpoint-1", "checkpoint-3"]
        assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".checkpoint")]
        told = " ".join(said.out.split())
        assert "Note: step 2:" in told
        assert "The run goes on, and tries the next checkpoint." in told
        assert f"--resume_from_checkpoint {run_dir}/checkpoint-3" in told
        assert_nothing_left(before)
        resumed = online.run(RLHFConfig(**settings))
        assert resumed.run_dir == run_dir
        assert names(run_dir) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
        assert_same(outcome(resumed), undisturbed_grpo)
    assert_nothing_left(before)


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("no room for snapshots", "a snapshot of the policy could not be kept"),
        ("no room for weights", "--resume_from_checkpoint"),
    ],
)
def test_a_store_that_fills(
    store: str, said: str, tiny: Tiny, tmp_path: Path, undisturbed_grpo: Outcome
) -> None:
    """Nothing may be written to the disk in its place either: Ray takes it for full."""
    settings = small(tiny, tmp_path, **GRPO, resume_from_checkpoint="auto")
    program = [sys.executable, "-m", "tests.faults.small_store", store, json.dumps(settings)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=400)
    told = " ".join((ended.stdout + ended.stderr).split())
    assert said in told
    assert "object store" in told
    (run_dir,) = (tmp_path / "out").iterdir()
    if store == "no room for weights":
        assert ended.returncode == 1
        assert names(run_dir) == ["checkpoint-2"]
        resumed = online.run(RLHFConfig(**settings))  # with room again
        assert resumed.run_dir == run_dir
        assert_same(outcome(resumed), undisturbed_grpo)
        return
    assert ended.returncode == 0, told
    result = RunResult(run_dir, "finished", 4, 4, run_dir / "checkpoint-4", None)
    assert_same(outcome(result), undisturbed_grpo)
