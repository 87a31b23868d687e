"""What is saved of a run that loses a node, and that the run goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.errors import NodeLostError, WorkerDiedError
from raytune_rl.pipelines import rescue
from raytune_rl.pipelines.going_on import going_on
from raytune_rl.pipelines.lifecycle import Run, RunResult
from raytune_rl.pipelines.resume_point import ResumePoint, open_run
from raytune_rl.runtime.health import Health
from raytune_rl.tracking.checkpoints import CheckpointWriter, list_checkpoints
from raytune_rl.tracking.run_dir import RunDir

LOST = "node 10.0.0.7 is lost."


class Learners:
    """Their snapshots are `behind` steps behind."""

    def __init__(self, behind: int = 0, fails: bool = False) -> None:
        self.steps, self._behind, self._fails = 0, behind, fails

    def snapshot_steps(self) -> int | None:
        return max(self.steps - self._behind, 0) or None

    def write_snapshot(self, directory: Path, steps: int) -> None:
        if self._fails:
            raise WorkerDiedError("a copy of the policy's snapshot was lost")
        (directory / "optimizer").mkdir()
        (directory / "optimizer" / "steps").write_text(str(steps))


def trained(
    resume_point: ResumePoint,
    learners: Learners,
    steps: int,
    marks: bool = True,
    error: BaseException = KeyboardInterrupt(),  # noqa: B008, as the watch of nodes ends a block
) -> None:
    """Some steps, and then a node is lost."""
    settings = SFTConfig(model="m", dataset="d", report_to="none")
    run = Run(settings, resume_point, 9, best_by="", greater_is_better=True)
    saved = rescue.Rescue(run, learners)
    with saved.ready():
        for _ in range(steps):
            run.step += 1
            learners.steps += 1
            if marks:
                saved.mark({"taken": run.step * 10})
        raise error


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Health:
    found = Health(lost=LOST)
    monkeypatch.setattr(rescue, "health", lambda: found)
    return found


def config(base: Path, **settings: Any) -> SFTConfig:
    return SFTConfig(model="m", dataset="d", output_dir=base / "out", report_to="none", **settings)


@pytest.mark.parametrize("behind", [0, 1])
def test_the_newest_snapshot_is_saved_with_the_state_of_its_step(
    behind: int, tmp_path: Path, lost: Health
) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(config(tmp_path)) as resume_point:
        trained(resume_point, Learners(behind), 3)
    assert lost.rescued == resume_point.run_dir.path / f"rescued-{3 - behind}"
    state = json.loads((lost.rescued / "trainer_state.json").read_text())
    assert (state["global_step"], state["taken"]) == (3 - behind, 10 * (3 - behind))
    assert list_checkpoints(resume_point.run_dir) == [], "nobody takes it for a checkpoint"


@pytest.mark.parametrize(
    ("learners", "marks", "said"),
    [
        (Learners(behind=9), True, ""),
        (Learners(), False, ""),
        (Learners(fails=True), True, "snapshot could not be saved: a copy of the policy's snapshot was lost"),
    ],
)
def test_without_a_whole_one_nothing_is(
    learners: Learners,
    marks: bool,
    said: str,
    tmp_path: Path,
    lost: Health,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(config(tmp_path)) as resume_point:
        trained(resume_point, learners, 3, marks)
    assert lost.rescued is None
    assert not list(resume_point.run_dir.path.glob("*rescued*"))
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_run_begins_again_from_it_and_then_it_is_gone(tmp_path: Path, lost: Health) -> None:
    """It is noticed by the watch of nodes, or by whoever waits for an answer."""
    began: list[tuple[int, int]] = []
    interrupt = KeyboardInterrupt()

    def attempt(given: SFTConfig) -> RunResult:
        with open_run(given) as resume_point:
            began.append((resume_point.step, int(resume_point.state.get("taken", 0))))
            if len(began) < 3:
                try:
                    trained(resume_point, Learners(), 2, error=lost.error() if began[1:] else interrupt)
                except KeyboardInterrupt:
                    raise lost.error() from None
            if len(began) == 3:
                with CheckpointWriter(resume_point.run_dir, 5) as path:
                    (path / "optimizer").mkdir()
                raise NodeLostError(LOST)
            return RunResult(resume_point.run_dir.path, "finished", 5, 5, None, None)

    result = going_on(config(tmp_path), attempt, sleep=lambda _: None)
    assert began == [(0, 0), (2, 20), (4, 40), (5, 0)], "a later checkpoint counts more"
    assert [path.name for path in RunDir(result.run_dir).path.glob("*rescued*")] == []
