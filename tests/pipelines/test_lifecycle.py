"""The work of every run around its loop, without a cluster."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.lifecycle import Run, find_resume_point


class Weights:
    """Something that can be saved."""

    def save(self, directory: Path, only_model: bool) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")


def run_in(directory: Path, **settings: Any) -> Run:
    config = SFTConfig(model="m", dataset="d", output_dir=directory, report_to="none", **settings)
    return Run(
        config, find_resume_point(config), total_steps=20, best_by="eval_loss", greater_is_better=False
    )


def logged(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.dir.logging_jsonl.read_text().splitlines()]


def test_a_checkpoint_is_the_best_one_only_if_it_was_evaluated(tmp_path: Path) -> None:
    """The evaluation of an earlier step says nothing of the weights that are saved now."""
    run = run_in(tmp_path)
    with run.watched():
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
    run = run_in(tmp_path, logging_steps=5)
    with run.watched():
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
    with pytest.raises(ConfigError, match="--report_to wandb needs the package wandb"):
        find_resume_point(config)
    assert not (tmp_path / "output").exists()
