"""Which run is gone on with, and that none is touched that lives or is another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.errors import ConfigError, RunInUseError
from raytune_rl.pipelines.resume_point import ResumePoint, open_run
from raytune_rl.tracking.checkpoints import CheckpointWriter
from raytune_rl.tracking.run_dir import RunDir


def config(base: Path, **settings: Any) -> SFTConfig:
    given = {
        "model": "org/m",
        "dataset": "org/d",
        "output_dir": base / "out",
        "report_to": "none",
        **settings,
    }
    return SFTConfig(**given)


def begun(base: Path, steps: int = 2, **settings: Any) -> RunDir:
    """A run that ended after a checkpoint, or before one."""
    with open_run(config(base, **settings)) as resume_point:
        if steps:
            with CheckpointWriter(resume_point.run_dir, steps) as path:
                (path / "optimizer").mkdir()
    return resume_point.run_dir


def resumed(base: Path, **settings: Any) -> ResumePoint:
    with open_run(config(base, resume_from_checkpoint="auto", **settings)) as resume_point:
        return resume_point


def test_auto_goes_on_with_the_newest_run_of_the_same(tmp_path: Path) -> None:
    mine = begun(tmp_path)
    begun(tmp_path, model="org/other")
    begun(tmp_path, steps=0)
    resume_point = resumed(tmp_path)
    assert resume_point.checkpoint == mine.checkpoint(2)
    assert resume_point.run_dir == mine


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model": "org/other"}, "--model org/other is asked for, it has org/m"),
        ({"dataset": "org/d#5"}, "--dataset org/d#5 is asked for, it has org/d"),
        ({"dataset": ["org/d", "org/e"]}, "--dataset org/d org/e is asked for"),
        ({"train_type": "full"}, "--train_type full is asked for, it has lora"),
        ({"lora_rank": 64}, "--lora_rank 64 is asked for, it has 8"),
    ],
)
def test_another_run_is_left_alone_and_it_is_said_why(
    tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    other = begun(tmp_path)
    before = sorted(other.path.rglob("*"))
    resume_point = resumed(tmp_path, **settings)
    assert resume_point.checkpoint is None
    assert resume_point.run_dir != other
    assert why in resume_point.notices[0]
    assert str(other.checkpoint(2)) in resume_point.notices[0]
    assert "this run starts anew" in resume_point.notices[1]
    assert sorted(other.path.rglob("*")) == before


def test_sft_does_not_go_on_with_what_grpo_left(tmp_path: Path) -> None:
    grpo = RLHFConfig(
        model="org/m", dataset="org/d", output_dir=str(tmp_path / "out"), report_to="none",
        reward_funcs="accuracy", per_device_train_batch_size=8,
    )  # fmt: skip
    with open_run(grpo) as resume_point, CheckpointWriter(resume_point.run_dir, 1) as path:
        (path / "optimizer").mkdir()
    assert "--rlhf_type (SFT) is asked for, it has grpo" in resumed(tmp_path).notices[0]


def test_what_does_not_make_another_run_is_told_and_gone_on_with(tmp_path: Path) -> None:
    mine = begun(tmp_path)
    resume_point = resumed(tmp_path, learning_rate=1e-3)
    assert resume_point.checkpoint == mine.checkpoint(2)
    assert any("--learning_rate is 0.001 now" in notice for notice in resume_point.notices)


def test_a_path_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path / "here")
    mine = begun(tmp_path, model="model", dataset="rows.jsonl#7")
    monkeypatch.chdir(tmp_path)
    resume_point = resumed(tmp_path, model="./here/model/", dataset=f"{tmp_path}/here/rows.jsonl#7")
    assert resume_point.checkpoint == mine.checkpoint(2)


def test_a_directory_of_one_run_is_not_given_to_another(tmp_path: Path) -> None:
    begun(tmp_path, add_version=False)
    with pytest.raises(ConfigError, match="is of another run: --model org/other"):
        resumed(tmp_path, add_version=False, model="org/other")
    assert resumed(tmp_path, add_version=False).step == 2


@pytest.mark.parametrize("steps", [0, 2])
def test_a_second_start_touches_nothing_of_a_run_that_lives(tmp_path: Path, steps: int) -> None:
    with open_run(config(tmp_path)) as first:
        if steps:
            with CheckpointWriter(first.run_dir, steps) as path:
                (path / "optimizer").mkdir()
        half = first.run_dir.path / ".checkpoint-4.tmp-0123abcd"
        half.mkdir()
        with pytest.raises(RunInUseError, match="is in use by another command"):
            resumed(tmp_path)
        assert half.is_dir()
        assert len(list((tmp_path / "out").glob("v*"))) == 1
    assert (resumed(tmp_path).checkpoint is None) == (steps == 0)
    assert half.is_dir() == (steps == 0)


def test_two_fresh_starts_do_not_share_a_directory(tmp_path: Path) -> None:
    with open_run(config(tmp_path)) as first, open_run(config(tmp_path)) as second:
        assert first.run_dir != second.run_dir
    alone = tmp_path / "alone"
    with (
        open_run(config(alone, add_version=False)),
        pytest.raises(RunInUseError),
        open_run(config(alone, add_version=False)),
    ):
        pass


def test_a_run_of_before_settings_were_recorded_is_told_apart_by_what_it_says(tmp_path: Path) -> None:
    mine = begun(tmp_path)
    kept = {"model": "org/m", "dataset": ["org/d"], "train_type": "lora"}
    mine.args_json.write_text(json.dumps(kept))
    assert resumed(tmp_path).checkpoint == mine.checkpoint(2)
