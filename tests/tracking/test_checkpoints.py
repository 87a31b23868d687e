import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_rl.errors import CheckpointError
from raytune_rl.tracking.best import CheckpointRecord
from raytune_rl.tracking.checkpoints import (
    CheckpointWriter,
    clean_leftovers,
    latest,
    list_checkpoints,
    prune,
    read_state,
    step_of,
    supersede_after,
    verify,
)
from raytune_rl.tracking.run_dir import RunDir


def save(run: RunDir, step: int, content: bytes = b"weights") -> Path:
    writer = CheckpointWriter(run, step, {"epoch": 0.5})
    with writer as path:
        (path / "global_step").mkdir()
        (path / "model.safetensors").write_bytes(content)
        (path / "global_step" / "rank0.pt").write_bytes(b"optimizer")
    return writer.final


def hidden(run: RunDir) -> list[str]:
    return [p.name for p in run.path.iterdir() if p.name.startswith(".")]


def steps(run: RunDir) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run)]


def test_a_saved_checkpoint_is_whole_and_complete(run: RunDir) -> None:
    run.write_args({"model": "m"})
    with CheckpointWriter(run, 10, {"epoch": 0.5, "global_step": 3}) as path:
        (path / "model.safetensors").write_bytes(b"weights")
        assert not run.checkpoint(10).exists()
    final = run.checkpoint(10)
    assert verify(final)["files"].keys() == {"model.safetensors", "trainer_state.json", "args.json"}
    assert read_state(final) == {"epoch": 0.5, "global_step": 10}
    assert RunDir(final).read_args() == {"model": "m"}
    assert hidden(run) == []


def write_half_and_raise(path: Path, error: type[BaseException]) -> None:
    (path / "half").write_text("x")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_passes_through(run: RunDir, error: type[BaseException]) -> None:
    earlier = save(run, 5)
    with pytest.raises(error), CheckpointWriter(run, 10) as path:
        write_half_and_raise(path, error)
    assert list_checkpoints(run) == [earlier]
    assert hidden(run) == []


def test_a_failing_disk_is_named_and_leaves_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="checkpoint-10 could not be saved: No space left"):
            save(run, 10)
    assert list_checkpoints(run) == []
    assert hidden(run) == []


def test_files_and_their_directory_are_synced_before_the_rename(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((name.name, run.checkpoint(10).exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    save(run, 10)
    before = [name for name, published in synced if not published]
    assert {"model.safetensors", "rank0.pt", "manifest.json", "trainer_state.json"} < set(before)
    assert before.index("rank0.pt") < before.index("global_step")
    assert before[-1].startswith(".checkpoint-10.tmp-")
    assert [name for name, published in synced if published] == [run.path.name]


KILLED = """
import os, sys
from pathlib import Path
from raytune_rl.tracking import checkpoints
from raytune_rl.tracking.run_dir import RunDir
run, moment = RunDir(Path(sys.argv[1])), sys.argv[2]
if moment == "before the rename":
    checkpoints.publish = lambda written, final: os._exit(9)
if moment == "between the renames":
    rename = Path.rename
    def die_after(self, target):
        rename(self, target)
        if ".old-" in str(target):
            os._exit(9)
    Path.rename = die_after
with checkpoints.CheckpointWriter(run, 20) as path:
    (path / "model.safetensors").write_bytes(b"new")
    if moment == "in the body":
        os._exit(9)
"""


def kill_while_saving(run: RunDir, moment: str) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(run.path), moment], check=False)
    assert child.returncode == 9


@pytest.mark.parametrize("moment", ["in the body", "before the rename"])
def test_a_kill_during_a_save_leaves_no_checkpoint(run: RunDir, moment: str) -> None:
    earlier = save(run, 10)
    kill_while_saving(run, moment)
    assert len(hidden(run)) == 1
    assert latest(run.path) == earlier
    assert steps(run) == [10]
    assert len(clean_leftovers(run)) == 1
    assert hidden(run) == []
    assert (save(run, 20) / "model.safetensors").read_bytes() == b"weights"
    assert latest(run.path) == run.checkpoint(20)


def test_a_kill_while_replacing_a_checkpoint_brings_the_old_one_back(run: RunDir) -> None:
    save(run, 20, b"old")
    kill_while_saving(run, "between the renames")
    assert steps(run) == []
    clean_leftovers(run)
    assert steps(run) == [20]
    assert (run.checkpoint(20) / "model.safetensors").read_bytes() == b"old"
    assert hidden(run) == []


def test_saving_a_step_again_replaces_it(run: RunDir) -> None:
    save(run, 5, b"old")
    final = save(run, 5, b"newer")
    assert (final / "model.safetensors").read_bytes() == b"newer"
    verify(final)
    assert hidden(run) == []


def test_verify_names_everything_that_is_wrong(run: RunDir) -> None:
    final = save(run, 5)
    (final / "README.md").write_text("added by a user")
    verify(final)
    (final / "model.safetensors").write_bytes(b"weigh")
    (final / "global_step" / "rank0.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        verify(final)
    assert "model.safetensors has 5 bytes instead of 7" in str(error.value)
    assert "global_step/rank0.pt is missing" in str(error.value)
    (final / "manifest.json").write_text(json.dumps({"files": []}))
    with pytest.raises(CheckpointError, match="damaged"):
        verify(final)
    (final / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        verify(final)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        verify(run.checkpoint(6))


def test_trainer_state_has_one_author(run: RunDir) -> None:
    with pytest.raises(CheckpointError, match="pass it as `state`"), CheckpointWriter(run, 5) as path:
        (path / "trainer_state.json").write_text("{}")
    assert list_checkpoints(run) == []


def test_latest_is_by_number_and_skips_what_is_not_whole(run: RunDir) -> None:
    for step in (9, 10, 100):
        save(run, step)
    assert latest(run.path) == run.checkpoint(100)
    (run.checkpoint(100) / "model.safetensors").unlink()
    assert latest(run.path) == run.checkpoint(10)


def test_latest_under_an_output_dir_is_of_the_newest_run_that_has_one(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    runs = [RunDir.create(tmp_path) for _ in range(3)]
    assert latest(tmp_path) is None
    save(runs[0], 50)
    expected = save(runs[1], 7)
    assert latest(tmp_path) == expected


def test_prune_keeps_the_newest_and_the_best(run: RunDir) -> None:
    for step in (1, 2, 3, 4, 5):
        save(run, step)
    assert prune(run, None) == []
    assert prune(run, 0) == []
    assert [step_of(p) for p in prune(run, 3, keep=run.checkpoint(1))] == [2, 3]
    assert steps(run) == [1, 4, 5]
    prune(run, 1, keep=run.checkpoint(1))
    assert steps(run) == [1, 5]
    prune(run, 1)
    assert steps(run) == [5]
    assert hidden(run) == []


def test_prune_never_counts_a_broken_checkpoint_as_a_survivor(run: RunDir) -> None:
    save(run, 1)
    save(run, 2)
    (run.checkpoint(2) / "model.safetensors").unlink()
    assert prune(run, 1) == []
    assert steps(run) == [1]


def test_resuming_earlier_sets_later_checkpoints_aside(run: RunDir) -> None:
    for step in (10, 20, 30):
        save(run, step)
    moved = supersede_after(run, 10)
    assert [p.name.rsplit("-", 2)[0] for p in moved] == [
        "superseded-checkpoint-20",
        "superseded-checkpoint-30",
    ]
    assert all((p / "model.safetensors").is_file() for p in moved)
    assert latest(run.path) == run.checkpoint(10)
    save(run, 11)
    prune(run, 1)
    assert steps(run) == [11]


def test_the_best_checkpoint_follows_the_metric(run: RunDir) -> None:
    record = CheckpointRecord()
    metrics = [(1, 0.2), (2, 0.7), (3, float("nan")), (4, 0.7), (5, None)]
    for step, metric in metrics:
        record = record.after(save(run, step), metric, greater_is_better=True)
    assert record.best == run.checkpoint(2)
    assert record.best_metric == 0.7
    assert record.last_model_checkpoint == str(run.checkpoint(5))
    lower = CheckpointRecord().after(run.checkpoint(1), 2.0, False).after(run.checkpoint(2), 1.0, False)
    assert lower.best == run.checkpoint(2)


def test_the_record_survives_a_move_and_forgets_what_is_gone(run: RunDir, tmp_path: Path) -> None:
    record = CheckpointRecord().after(save(run, 1), 0.5, True).after(save(run, 2), 0.1, True)
    moved = RunDir(run.path.rename(tmp_path / "elsewhere"))
    restored = CheckpointRecord.from_state(record.as_dict(), moved)
    assert restored == CheckpointRecord(str(moved.checkpoint(2)), str(moved.checkpoint(1)), 0.5)
    prune(moved, 1)
    assert CheckpointRecord.from_state(record.as_dict(), moved) == CheckpointRecord(str(moved.checkpoint(2)))
