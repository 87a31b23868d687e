"""The work of every run around its loop, without a cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.errors import CheckpointError, ConfigError, RunInUseError
from raytune_rl.pipelines.lifecycle import Run
from raytune_rl.pipelines.resume_point import open_run


class Weights:
    """Something that can be saved."""

    def save(self, directory: Path, only_model: bool) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")


@contextmanager
def run_in(directory: Path, **settings: Any) -> Iterator[Run]:
    config = SFTConfig(model="m", dataset="d", output_dir=directory, report_to="none", **settings)
    with open_run(config) as resume_point:
        run = Run(config, resume_point, total_steps=20, best_by="eval_loss", greater_is_better=False)
        with run.watched():
            yield run


def logged(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.dir.logging_jsonl.read_text().splitlines()]


def test_a_checkpoint_is_the_best_one_only_if_it_was_evaluated(tmp_path: Path) -> None:
    """The evaluation of an earlier step says nothing of the weights that are saved now."""
    with run_in(tmp_path) as run:
        for loss in (3.0, 2.0, 1.0):
            run.record({"loss": loss})
            if run.step != 3:
                run.record_evaluation({"eval_loss": loss})
            if run.step != 2:
                run.save(Weights(), {})
        result = run.finish()
    assert result.best_checkpoint is not None
    assert result.best_checkpoint.name == "checkpoint-1"
    assert result.last_checkpoint is not None
    assert result.last_checkpoint.name == "checkpoint-3"


def test_a_step_that_was_left_out_is_told_logged_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_in(tmp_path, logging_steps=5) as run:
        for norm in (1.0, 1.0, math.inf, 1.0, 1.0):
            run.record({"loss": 1.0, "grad_norm": norm})
        run.finish()
    lines = [line for line in logged(run) if "loss" in line]
    assert [line["global_step/max_steps"] for line in lines] == ["1/20", "3/20", "5/20"]
    assert lines[1]["non_finite"] == ["grad_norm"]
    assert run.logger.non_finite == {"grad_norm": 1}
    said = " ".join(capsys.readouterr().out.split())
    assert "step 3/20 | grad_norm is not finite: the step was left out" in said


def test_a_sink_that_is_not_installed_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = SFTConfig(model="m", dataset="d", output_dir=tmp_path / "output", report_to="wandb")
    with pytest.raises(ConfigError, match="--report_to wandb needs the package wandb"), open_run(config):
        pass
    assert not (tmp_path / "output").exists()


class FullDisk:
    """Cannot be saved while there is no room."""

    full = True

    def save(self, directory: Path, only_model: bool) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        if self.full:
            raise CheckpointError(f"{directory} could not be written: No space left on device.")


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_is_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = FullDisk()
    with run_in(tmp_path) as run:
        run.record({"loss": 1.0})
        assert run.save(disk, {}) is None
        assert [p.name for p in run.dir.path.iterdir() if "checkpoint" in p.name] == []
        run.record({"loss": 1.0})
        disk.full = False
        assert run.save(disk, {}) == run.dir.checkpoint(2)
        run.finish()
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1:" in said
    assert "No space left on device. The run goes on" in said
    assert "1 checkpoint(s) of this run could not be written" in said


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        for _ in range(20):
            run.record({"loss": 1.0})
        with pytest.raises(CheckpointError, match="No space left"):
            run.save(FullDisk(), {})


def test_without_a_save_strategy_nothing_is_saved(tmp_path: Path) -> None:
    with run_in(tmp_path, save_strategy="no") as run:
        for _ in range(20):
            run.record({"loss": 1.0})
        assert run.save(Weights(), {}) is None
        assert run.finish().last_checkpoint is None
    assert run.dir.checkpoints == []


def test_a_run_that_was_taken_over_writes_no_checkpoint(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        run.record({"loss": 1.0})
        (run.dir.path / "run.lock").write_text(json.dumps({"token": "another's", "host": "h", "pid": 1}))
        with pytest.raises(RunInUseError, match="taken over by another command"):
            run.save(Weights(), {})
        assert run.dir.checkpoints == []
