"""A run that fails says what it can go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.errors import WorkerDiedError
from raytune_rl.pipelines.lifecycle import Run, find_resume_point


class Weights:
    """Something that can be saved."""

    def save(self, directory: Path, only_model: bool) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")


def failing(directory: Path, saves: bool, **settings: Any) -> None:
    config = SFTConfig(model="m", dataset="d", output_dir=directory, report_to="none", **settings)
    run = Run(config, find_resume_point(config), total_steps=9, best_by="eval_loss", greater_is_better=False)
    with run.watched():
        run.record({"loss": 1.0})
        if saves:
            run.save(Weights(), {})
        raise WorkerDiedError("policy[1] died during 'training step 2'")


def test_what_a_failed_run_can_go_on_from_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDiedError):
        failing(tmp_path, saves=True)
    said = "".join(capsys.readouterr().out.split())
    assert "--resume_from_checkpoint" + str(next(tmp_path.glob("*/checkpoint-1"))) in said


@pytest.mark.parametrize(("saves", "settings"), [(False, {}), (True, {"save_only_model": True})])
def test_nothing_is_promised_that_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saves: bool, settings: dict[str, Any]
) -> None:
    with pytest.raises(WorkerDiedError):
        failing(tmp_path, saves, **settings)
    assert "--resume_from_checkpoint" not in capsys.readouterr().out
