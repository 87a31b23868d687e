"""GRPO on a model that hears: engine and policy hear the same sounds, and agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from raytune_rl.tiny.audio import make_tiny_audio_model
from tests.cluster.test_online import GAP, PLUGIN, steps
from tests.vision.films import tone

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(300)]

HEARS = """

class Hears(ORM):
    def __call__(self, completions, audios, **kwargs):
        assert all(sound["bytes"] or sound["path"] for row in audios for sound in row)
        return [float(len(row)) for row in audios]

orms["hears"] = Hears
"""


def test_what_the_engine_hears_is_what_the_policy_learns_from(cluster: None, tmp_path: Path) -> None:
    """One sound, two, and none; the ears train."""
    (tmp_path / "plugin.py").write_text(PLUGIN + HEARS)
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    (tmp_path / "b.wav").write_bytes(tone(1.2, hertz=880.0))
    rows = [
        {"audios": ["a.wav"], "problem": "<audio>What?", "solution": "low"},
        {"audios": ["b.wav", "a.wav"], "problem": "<audio>Is <audio> lower?", "solution": "yes"},
        {"problem": "How are you?", "solution": "well"},
        {"audios": ["b.wav"], "problem": "What is it?", "solution": "high"},
    ]
    data = tmp_path / "rl.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    model = make_tiny_audio_model(tmp_path / "model")
    config = RLHFConfig(
        model=str(model),
        dataset=str(data),
        root_image_dir=str(tmp_path),
        reward_funcs=["digits", "hears"],
        reward_weights=[1.0, 0.0],
        external_plugins=[str(tmp_path / "plugin.py")],
        train_type="full",
        freeze_vit=False,
        freeze_aligner=False,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=12,
        learning_rate=3e-3,
        warmup_ratio=0.0,
        beta=0.01,
        max_steps=2,
        logging_steps=1,
        log_completions=True,
        output_dir=str(tmp_path / "out"),
    )
    result = online.run(config)
    logged = steps(result)
    assert sorted(logged) == [1, 2]
    assert max(line[GAP] for line in logged.values()) < 1e-4
    said = [json.loads(line) for line in (result.run_dir / "completions.jsonl").read_text().splitlines()]
    assert {(len(row["media"]), row["rewards"]["Hears"]) for row in said} == {(0, 0.0), (1, 1.0), (2, 2.0)}
    before = load_file(model / "model.safetensors")
    after = load_file(result.last_checkpoint / "model.safetensors")  # type: ignore[operator]
    assert before.keys() == after.keys(), "under the names that other programs know"
    ears = [name for name in before if name.startswith("audio_tower.layers.")]
    assert any(not np.array_equal(before[name], after[name]) for name in ears)
