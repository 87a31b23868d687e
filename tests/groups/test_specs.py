"""The specs of the groups: what a vision model changes in them, and what a machine cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.groups import lora_sync, specs
from raytune_rl.protocol.data import MediaCounts

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(**GIVEN, **settings)


def most(**of_kind: int) -> MediaCounts:
    return MediaCounts(most=of_kind)


def test_the_engine_makes_room_for_the_media_that_the_data_has() -> None:
    assert specs.prompt_limits(config(), False, []) is None
    assert specs.prompt_limits(config(), True, [most(image=3), most(image=1)]) == {
        "image": 3,
        "video": 0,
        "audio": 0,
    }
    assert specs.prompt_limits(config(), True, [most()]) == {"image": 1, "video": 0, "audio": 0}
    found = specs.prompt_limits(config(), True, [most(video=1), most(audio=2)])
    assert found == {"image": 0, "video": 1, "audio": 2}
    limited = config(vllm_limit_mm_per_prompt={"image": 5})
    assert specs.prompt_limits(limited, True, [most(image=2)]) == {"image": 5, "video": 0, "audio": 0}
    with pytest.raises(ConfigError, match="allows 5 images, but a prompt has 6"):
        specs.prompt_limits(limited, True, [most(image=6)])


def test_adapters_in_the_tower_arrive_merged() -> None:
    """vLLM applies adapters to the language model only."""
    assert lora_sync.publish_mode(config(), takes_media=True) == "adapter"
    assert lora_sync.publish_mode(config(freeze_vit=False), takes_media=True) == "merged"
    assert lora_sync.publish_mode(config(freeze_aligner=False), takes_media=True) == "merged"
    assert lora_sync.publish_mode(config(freeze_vit=False), takes_media=False) == "adapter"
    for named in ({"target_regex": ".*q_proj"}, {"target_modules": ("gate_proj",)}):
        assert lora_sync.publish_mode(config(**named), takes_media=True) == "merged"
        assert lora_sync.publish_mode(config(**named), takes_media=False) == "adapter"
    with pytest.raises(ConfigError, match="--vllm_enable_lora true: vLLM applies adapters to the language"):
        lora_sync.publish_mode(config(freeze_vit=False, vllm_enable_lora=True), takes_media=True)


def test_flags_for_images_are_told_to_do_nothing_for_a_text_model() -> None:
    given = config(max_pixels=5000, vllm_limit_mm_per_prompt={"image": 1})
    assert specs.media_notices(given, on_gpu=False, takes_media=False) == [
        "--max_pixels, --vllm_limit_mm_per_prompt do nothing: the model takes texts only"
    ]
    assert specs.media_notices(given, on_gpu=False, takes_media=True) == []


def test_the_loaders_processes_are_threads_that_make_pixels() -> None:
    assert specs.model_spec(config(), on_gpu=False, takes_media=True).media_threads == 1
    given = config(dataloader_num_workers=4)
    assert specs.model_spec(given, on_gpu=False, takes_media=True).media_threads == 4
    (notice,) = specs.media_notices(given, on_gpu=False, takes_media=False)
    assert notice.startswith(
        "--dataloader_num_workers does nothing: rows of texts are prepared before training"
    )


def test_rows_are_packed_where_a_kernel_knows_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention may be asked for where it is not installed: sdpa, which stands in, pays for padding
    less than for a mask over the whole pack.
    """
    asked = config(attn_impl="flash_attn")
    for installed, layout in ((True, "packed"), (False, "padded")):
        monkeypatch.setattr(specs, "_has_flash_attention", lambda there=installed: there)
        assert specs.layout(asked, on_gpu=True) == layout
        assert specs.layout(asked, on_gpu=False) == "padded"
        assert specs.layout(config(attn_impl="flash_attn", padding_free=True), on_gpu=True) == "packed"


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="--torch_dtype float16 trains on a GPU only"):
        specs.check_machine(config(torch_dtype="float16"), on_gpu=False)
    specs.check_machine(config(torch_dtype="float16"), on_gpu=True)
    specs.check_machine(config(torch_dtype="bfloat16"), on_gpu=False)
