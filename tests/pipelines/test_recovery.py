"""What is said, counted and kept of losses, and when a run begins again as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import (
    NodeLostError,
    PlacementError,
    RestartsUsedUpError,
    SnapshotMissingError,
    WorkerFailedError,
)
from raytune_rl.pipelines.going_on import going_on, newest
from raytune_rl.pipelines.recovery import FaultLog, in_words, rules_of
from raytune_rl.protocol.faults import Fault
from raytune_rl.tracking import faults
from raytune_rl.tracking.checkpoints import CheckpointWriter
from raytune_rl.tracking.html_report import write_report
from raytune_rl.tracking.run_dir import RunDir


def config(**settings: Any) -> RLHFConfig:
    shape: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}
    return RLHFConfig(**shape, **settings)


def test_a_loss_is_said_counted_and_kept_as_a_line_and_a_row(tmp_path: Path) -> None:
    said: list[str] = []
    log = FaultLog(tmp_path / "faults.jsonl", said.append, lambda: 36_000.0)
    assert (log.metrics(), log.rows()) == ({}, [])
    log.replaced("reward", "reward[2] died during 'scoring 4 completions': gone. It is started anew.")
    log.recovered(
        Fault(
            36_005.0, "policy", "policy[1]", "training step 5", "it died", "again", 7.4, "2 optimizer steps"
        )
    )
    assert said == ["Note: reward[2] died during 'scoring 4 completions': gone. It is started anew."]
    assert log.metrics() == {
        "faults/lost_workers": 2.0,
        "faults/recovery_seconds": 7.4,
        "faults/repeated_steps": 2.0,
    }
    assert log.rows() == [
        ("1970-01-01 10:00:00", "reward[2]", "scoring 4 completions", "beside the run", "the call itself"),
        ("1970-01-01 10:00:05", "policy[1]", "training step 5", "7s", "2 optimizer steps"),
    ]
    run_dir = RunDir(tmp_path)
    (tmp_path / "images").mkdir()
    page = write_report(run_dir, {}).read_text()
    assert "Lost and started anew" in page
    assert "<td>policy[1]</td><td>training step 5</td>" in page
    assert len(faults.read(run_dir.faults_jsonl)) == 2


def test_the_plan_says_what_a_lost_rank_costs(tmp_path: Path) -> None:
    assert "ends the run (--max_restarts 0)" in in_words(config(max_restarts=0))[1]
    assert "--snapshot_steps 0" in in_words(config(snapshot_steps=0))[1]
    assert "every 7 step(s)" in in_words(config(snapshot_steps=7))[1]
    assert "each step where it costs under 5%" in in_words(config())[1]


def test_snapshots_of_all_worlds_old_and_new_fill_a_third_of_the_store(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "faults.jsonl", print)
    rules = rules_of(config(), log, 1200, worlds=2, copy=lambda refs, name: None)
    assert rules.snapshot_bytes == 100


class Attempts:
    """A run that fails as often as the test says."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.resumed: list[str | None] = []
        self.slept: list[float] = []

    def __call__(self, config: RLHFConfig) -> Any:
        self.resumed.append(config.resume_from_checkpoint)
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def test_a_lost_node_begins_the_run_again_from_its_newest_checkpoint() -> None:
    attempts = Attempts(NodeLostError("node 10.0.0.7 is lost."), PlacementError("no room"))
    assert going_on(config(), attempts, attempts.slept.append) == "done"
    assert attempts.resumed == [None, "auto", "auto"]
    assert attempts.slept == [0, 1]


def test_what_cannot_be_gone_on_from_is_raised_as_it_is() -> None:
    head = NodeLostError("the head is lost.")
    head.survivable = False
    for error in (head, PlacementError("no room"), WorkerFailedError("a defect"), RestartsUsedUpError("all")):
        with pytest.raises(type(error)) as raised:
            going_on(config(), Attempts(error))
        assert raised.value is error


def test_restarts_of_the_whole_have_a_budget_too() -> None:
    attempts = Attempts(*[SnapshotMissingError("policy[0] died.")] * 3)
    with pytest.raises(RestartsUsedUpError, match="all 2 restarts"):
        going_on(config(max_restarts=2), attempts, attempts.slept.append)
    assert len(attempts.resumed) == 3


def test_a_run_named_by_a_checkpoint_goes_on_from_its_newest(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "out", add_version=True)
    run.write_args({})
    for step in (2, 10):
        with CheckpointWriter(run, step) as path:
            (path / "model.safetensors").write_text("weights")
    asked = str(run.checkpoint(2))
    assert newest(config(resume_from_checkpoint=asked)) == str(run.checkpoint(10))
    assert newest(config()) == newest(config(resume_from_checkpoint="auto")) == "auto"
    assert newest(config(resume_from_checkpoint=str(tmp_path / "nowhere"))) == str(tmp_path / "nowhere")
