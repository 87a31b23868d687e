"""GRPO on a vision model: engine, policy and reference see the same pictures and films, and agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines import online, ppo
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.test_online import GAP, PLUGIN, steps
from tests.vision.films import film

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


# Rewards see each completion's pictures and films, and the tokens that were sampled.
SEES = """

class Sees(ORM):
    def __call__(self, completions, images, videos, response_token_ids, completion_tokens, **kwargs):
        assert [len(ids) for ids in response_token_ids] == completion_tokens
        shown = [seen + films for seen, films in zip(images, videos)]
        for row in shown:
            assert all(bool(one["path"]) != bool(one["bytes"]) for one in row)
        return [float(len(row)) for row in shown]

orms["sees"] = Sees
"""


def mixed_rows(directory: Path) -> Path:
    """Prompts with one picture and no tag, with two and their tags, with none, and with a film."""
    shapes = [json.loads(line) for line in write_shapes(directory, train=16).rl.read_text().splitlines()]
    lines = []
    for number, row in enumerate(shapes):
        if number % 4 == 1:
            both = [row["image"], shapes[number - 1]["image"]]
            row = {"images": both, "problem": "<image>Is <image> alike?", "solution": row["solution"]}
        elif number % 4 == 2:
            row = {"problem": "How are you?", "solution": "well"}
        elif number % 4 == 3:
            (directory / f"{number}.mp4").write_bytes(film(frames=12, fps=4))
            row = {"videos": [f"{number}.mp4"], "problem": "<video>What?", "solution": "grey"}
        lines.append(json.dumps(row))
    path = directory / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def config(root: Path, **settings: object) -> RLHFConfig:
    (root / "plugin.py").write_text(PLUGIN + SEES)
    small = {
        "model": str(make_tiny_vision_model(root / "model")),
        "dataset": f"{mixed_rows(root / 'data')}#4",
        "dataset_shuffle": False,
        "reward_funcs": ["digits", "sees"],
        "reward_weights": [1.0, 0.0],
        "external_plugins": [str(root / "plugin.py")],
        "train_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "max_pixels": 28 * 28 * 3,
        "root_image_dir": str(root / "data"),
        "policy_workers": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 16,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.0,
        "num_iterations": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "log_completions": True,
        "output_dir": str(root / "out"),
    }
    return RLHFConfig(**{**small, **settings})  # type: ignore[arg-type]


def test_mixed_prompts_are_sampled_and_trained_on_alike(cluster: None, tmp_path: Path) -> None:
    """Two ranks, and the tower trains; each of three generations shows the same pictures, and is trained on
    twice. A prompt that vLLM read otherwise than the policy would end the run; another picture, features kept
    from older weights or a sampled placeholder would show in the gap."""
    result = online.run(config(tmp_path))
    logged = steps(result)
    print({step: (line[GAP], line["grad_norm"]) for step, line in logged.items()})
    assert len(logged) == 6
    assert max(line[GAP] for line in logged.values()) < 1e-4
    assert max(line["grad_norm"] for line in logged.values()) > 0
    assert logged[6]["kl"] > 0
    rows = [json.loads(line) for line in (result.run_dir / "completions.jsonl").read_text().splitlines()]
    assert [len(row["media"]) for row in rows] == [row["rewards"]["Sees"] for row in rows]
    assert {len(row["media"]) for row in rows} == {0, 1, 2}
    assert len({name for row in rows for name in row["media"]}) == 3, "a picture is named the same everywhere"

    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(result.last_checkpoint / "model.safetensors")
    tower = [name for name in before if "visual" in name]
    moved = [name for name in tower if not np.array_equal(before[name], after[name])]
    assert len(moved) == len(tower) > 10

    prompts = {json.loads(line)["prompt"] for line in (result.run_dir / "completions.jsonl").open()}
    assert {prompt.count("<|image_pad|>") for prompt in prompts} == {0, 1, 2}
    assert {prompt.count("<|video_pad|>") for prompt in prompts} == {0, 1}


@pytest.mark.variants
def test_ppo_on_pictures(cluster: None, tmp_path: Path) -> None:
    """Policy, critic and reference (the policy without its adapter) see the pictures of mixed prompts."""
    given = config(tmp_path, max_steps=4).model_dump(exclude_unset=True)
    for name in ("train_type", "freeze_vit", "freeze_aligner", "num_iterations"):
        given.pop(name)
    result = ppo.run(
        PPOConfig(**{**given, "num_ppo_epochs": 2, "critic_learning_rate": 1e-4, "lora_dropout": 0.0})
    )
    logged = steps(result)
    print({step: (line["loss/value_avg"], line["critic/grad_norm"]) for step, line in logged.items()})
    assert sorted(logged) == [1, 2, 3, 4]
    assert max(line[GAP] for line in logged.values()) < 1e-4
    assert logged[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert logged[3]["objective/kl"] != 0
    for first in (1, 3):
        assert logged[first]["critic/grad_norm"] > 0
        assert logged[first]["reward_std"] > 0
    # Only the first time: later the momentum of steps on other rows has its say.
    assert logged[2]["loss/value_avg"] < logged[1]["loss/value_avg"], "the critic learns from the same rows"
    assert (result.last_checkpoint / "critic" / "adapter_model.safetensors").is_file()  # type: ignore[operator]


def test_a_prompt_with_more_images_than_allowed_stops_before_anything_starts(
    cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"allows 1 images, but a prompt has 2"):
        online.run(config(tmp_path, vllm_limit_mm_per_prompt={"image": 1}))
