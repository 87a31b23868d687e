"""A run that fails says what it can go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.errors import WorkerDiedError
from raytune_rl.pipelines.lifecycle import Run
from raytune_rl.pipelines.resume_point import open_run


class Weights:
    """Something that can be saved."""

    def save(self, directory: Path, only_model: bool) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")
        if not only_model:
            (directory / "optimizer").mkdir()


def failing(directory: Path, saves: bool, error: BaseException | None = None, **settings: Any) -> None:
    config = SFTConfig(model="m", dataset="d", output_dir=directory, report_to="none", **settings)
    with open_run(config) as resume_point:
        run = Run(config, resume_point, total_steps=9, best_by="eval_loss", greater_is_better=False)
        with run.watched():
            run.record({"loss": 1.0})
            if saves:
                run.save(Weights(), {})
            raise error or WorkerDiedError("policy[1] died during 'training step 2'")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError(), KeyboardInterrupt()])
def test_whatever_ends_a_run_it_is_said_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    with pytest.raises(type(error)):
        failing(tmp_path, True, error)
    (run,) = tmp_path.iterdir()
    assert f"--resume_from_checkpoint {run}/checkpoint-1\n" in capsys.readouterr().out
    assert not (run / "run.lock").exists()


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
