"""A disk that fills at any file of a checkpoint is a `CheckpointError`, which a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_rl.errors import CheckpointError
from raytune_rl.models.weights import save_model
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tracking.checkpoints import CheckpointWriter, list_checkpoints
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.workers.saving import writing
from tests.disks import read_only, small_disk


def test_wherever_the_disk_is_full_the_error_is_named_and_no_checkpoint_is_there(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", tied=True, hidden=16, layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    disk = tmp_path / "disk"
    disk.mkdir()
    reasons = set()
    whole = sum(-(-file.stat().st_size // 4096) * 4 for file in source.iterdir())
    for kib in range(16, whole + 64, max(8, whole // 40)):
        with small_disk(disk, kib):
            run_dir = RunDir(disk)
            try:
                with CheckpointWriter(run_dir, 1) as path, writing(str(path)):
                    save_model(model, path, tokenizer)
            except CheckpointError as error:
                reasons.add(str(error).partition(": ")[2])
                assert list(disk.iterdir()) == []
            else:
                assert [checkpoint.name for checkpoint in list_checkpoints(run_dir)] == ["checkpoint-1"]
                break
    else:
        pytest.fail("it never fits")
    assert len(reasons) > 1, "of safetensors, of tokenizers, of Python"
    assert all("No space left on device" in reason for reason in reasons)


def test_a_disk_that_is_only_read_keeps_what_it_has(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with small_disk(tmp_path, 64):
        with CheckpointWriter(run_dir, 1):
            pass
        with (
            read_only(tmp_path),
            pytest.raises(CheckpointError, match="checkpoint-2 could not be saved: Read-only file system"),
            CheckpointWriter(run_dir, 2),
        ):
            pytest.fail("there is nowhere to write to")
        assert [checkpoint.name for checkpoint in list_checkpoints(run_dir)] == ["checkpoint-1"]


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a defect"), writing(str(tmp_path)):
        raise ValueError("a defect")
