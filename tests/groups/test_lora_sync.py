"""The adapter travels alone only where an engine gives the policy's answers with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.groups.lora_sync import engine_rank, publish_mode

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(**{**GIVEN, **settings})


def adapter(path: Path, **settings: Any) -> str:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": 24, "target_modules": ["q_proj"], **settings}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((24, 8), dtype=np.float32)}, path / "adapter_model.safetensors")
    return str(path)


def test_what_the_flags_decide() -> None:
    assert publish_mode(config(train_type="full")) == "full"
    assert publish_mode(config()) == "adapter"
    assert publish_mode(config(vllm_enable_lora=False)) == "merged"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "weights on lm_head"),
        ({"lora_rank": 1024}, "rank over 512"),
        ({"quant_method": "bnb", "quant_bits": 4}, "not be quantised as the policy's is"),
    ],
)
def test_what_the_engine_would_not_serve_arrives_merged(settings: dict[str, Any], reason: str) -> None:
    assert publish_mode(config(**settings)) == "merged"
    with pytest.raises(ConfigError, match=f"--vllm_enable_lora true: .*{reason}"):
        publish_mode(config(**settings, vllm_enable_lora=True))


def test_of_a_vision_model_the_language_model_alone_is_served(tmp_path: Path) -> None:
    assert publish_mode(config(), takes_media=True) == "adapter"
    assert publish_mode(config(target_modules=["q_proj"]), takes_media=True) == "merged"
    assert publish_mode(config(adapters=[adapter(tmp_path / "tower")]), takes_media=True) == "merged"
    with pytest.raises(ConfigError, match="those of --target_modules may lie elsewhere"):
        publish_mode(config(target_modules=["q_proj"], vllm_enable_lora=True), takes_media=True)


def test_an_engine_that_quantises_the_base_takes_the_adapter() -> None:
    quantised = config(quant_method="bnb", quant_bits=4, vllm_engine_kwargs={"quantization": "bitsandbytes"})
    assert publish_mode(quantised) == "adapter"


def test_an_adapter_to_go_on_with_keeps_its_own_settings(tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain")
    assert publish_mode(config(adapters=[plain])) == "adapter"
    assert engine_rank(config(adapters=[plain])) == 24
    assert engine_rank(config(adapters=[plain], vllm_max_lora_rank=64)) == 64
    with pytest.raises(ConfigError, match=r"--vllm_max_lora_rank 8 must be at least the adapter's rank, 24"):
        engine_rank(config(adapters=[plain], vllm_max_lora_rank=8))
    with pytest.raises(ConfigError, match="at most 512"):
        engine_rank(config(vllm_max_lora_rank=1024))
    assert publish_mode(config(adapters=[adapter(tmp_path / "dora", use_dora=True)])) == "merged"
    several = config(adapters=[adapter(tmp_path / "first"), plain])
    assert publish_mode(several) == "merged", "the engine does not have the first"
    with pytest.raises(ModelError, match="has no weights"):
        publish_mode(config(adapters=[str(tmp_path)]))
    (Path(plain) / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        publish_mode(config(adapters=[plain]))
