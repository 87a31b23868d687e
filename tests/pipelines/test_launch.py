"""What the groups are told: what a vision model changes in it, and what a machine cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines import launch, wire

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(**GIVEN, **settings)


def test_the_engine_makes_room_for_the_images_that_the_data_has() -> None:
    assert launch.media_limits(config(), vision=False, most_images=0) is None
    assert launch.media_limits(config(), True, 3) == {"image": 3, "video": 0, "audio": 0}
    assert launch.media_limits(config(), True, 0) == {"image": 1, "video": 0, "audio": 0}
    limited = config(vllm_limit_mm_per_prompt={"image": 5})
    assert launch.media_limits(limited, True, 2) == {"image": 5, "video": 0, "audio": 0}
    with pytest.raises(ConfigError, match="allows 5 images, but a prompt has 6"):
        launch.media_limits(limited, True, 6)


def test_adapters_in_the_tower_arrive_merged() -> None:
    """vLLM applies adapters to the language model only."""
    assert wire.publish_mode(config(), vision=True) == "adapter"
    assert wire.publish_mode(config(freeze_vit=False), vision=True) == "merged"
    assert wire.publish_mode(config(freeze_aligner=False), vision=True) == "merged"
    assert wire.publish_mode(config(freeze_vit=False), vision=False) == "adapter"
    for named in ({"target_regex": ".*q_proj"}, {"target_modules": ("gate_proj",)}):
        assert wire.publish_mode(config(**named), vision=True) == "merged"
        assert wire.publish_mode(config(**named), vision=False) == "adapter"
    with pytest.raises(ConfigError, match="--vllm_enable_lora true: vLLM applies adapters to the language"):
        wire.publish_mode(config(freeze_vit=False, vllm_enable_lora=True), vision=True)


def test_flags_for_images_are_told_to_do_nothing_for_a_text_model() -> None:
    given = config(max_pixels=5000, vllm_limit_mm_per_prompt={"image": 1})
    assert launch.image_notices(given, on_gpu=False, vision=False) == [
        "--max_pixels, --vllm_limit_mm_per_prompt do nothing: the model takes no images"
    ]
    assert launch.image_notices(given, on_gpu=False, vision=True) == []


def test_the_loaders_processes_are_threads_that_make_pixels() -> None:
    assert launch.model_spec(config(), on_gpu=False, vision=True).image_threads == 1
    given = config(dataloader_num_workers=4)
    assert launch.model_spec(given, on_gpu=False, vision=True).image_threads == 4
    (told,) = launch.image_notices(given, on_gpu=False, vision=False)
    assert told.startswith(
        "--dataloader_num_workers does nothing: rows of texts are prepared before training"
    )


def test_rows_are_packed_where_a_kernel_knows_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention may be asked for where it is not installed: sdpa, which stands in, pays for padding
    less than for a mask over the whole pack.
    """
    asked = config(attn_impl="flash_attn")
    for installed, layout in ((True, "packed"), (False, "padded")):
        monkeypatch.setattr(launch, "_has_flash_attention", lambda there=installed: there)
        assert launch.layout(asked, on_gpu=True) == layout
        assert launch.layout(asked, on_gpu=False) == "padded"
        assert launch.layout(config(attn_impl="flash_attn", padding_free=True), on_gpu=True) == "packed"


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="--torch_dtype float16 trains on a GPU only"):
        launch.check_machine(config(torch_dtype="float16"), on_gpu=False)
    launch.check_machine(config(torch_dtype="float16"), on_gpu=True)
    launch.check_machine(config(torch_dtype="bfloat16"), on_gpu=False)
