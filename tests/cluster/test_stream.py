"""A run over a stream: windows while it trains, and a resume inside one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import cli
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def losses(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return {line["global_step/max_steps"]: line["loss"] for line in lines if "loss" in line}


def test_a_stream_resumes_inside_a_window(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    """64 rows in windows of 24, 8 a step: 3 steps a window; the second pass begins within the third."""
    words = [
        "sft", "--model", str(tiny.tied), "--dataset", str(tiny.data.sft), "--streaming", "true",
        "--shuffle_buffer_size", "24", "--max_steps", "11", "--per_device_train_batch_size", "8",
        "--gradient_accumulation_steps", "1", "--save_steps", "5", "--logging_steps", "1",
        "--learning_rate", "1e-3", "--train_type", "full", "--output_dir", str(tmp_path),
        "--val_dataset", f"{tiny.data.sft}#8",
    ]  # fmt: skip
    assert cli.main(words) == 0
    (run,) = tmp_path.iterdir()
    straight = losses(run)
    assert len(straight) == 11
    assert straight["11/11"] < straight["1/11"]
    state = json.loads((run / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["data_epoch"], state["data_taken"]) == (1, 16)

    assert cli.main([*words, "--resume_from_checkpoint", str(run / "checkpoint-5")]) == 0
    assert losses(run) == straight
