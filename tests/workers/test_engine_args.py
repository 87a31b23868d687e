"""Arguments that reach vLLM's EngineArgs beside what a run decides itself."""

from pathlib import Path

import pytest
from transformers import DeepseekV3Config, MiniMaxM2Config, PreTrainedConfig, Qwen2Config

from raytune_rl.errors import ConfigError
from raytune_rl.protocol.rollout import EngineSpec


def test_further_arguments_are_vllms_own(tmp_path: Path) -> None:
    from raytune_rl.workers.vllm_args import engine_args

    Qwen2Config().save_pretrained(tmp_path)

    def made(**more: object) -> dict[str, object]:
        return engine_args(EngineSpec(str(tmp_path), "float32", 64, "store", 1.0, more=more))

    assert made(block_size=32)["block_size"] == 32
    assert "block_size" not in made()
    with pytest.raises(ConfigError, match="EngineArgs have no blok_size, nope"):
        made(nope=1, blok_size=32)


def test_the_engine_computes_what_transformers_does(tmp_path: Path) -> None:
    """A configuration that Transformers wrote lacks what vLLM reads; what stands in it stays."""
    from raytune_rl.workers.vllm_args import engine_args

    def overrides(config: PreTrainedConfig, **more: object) -> object:
        config.save_pretrained(tmp_path)
        return engine_args(EngineSpec(str(tmp_path), "float32", 64, "store", 1.0, more=more)).get(
            "hf_overrides"
        )

    sigmoid = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    assert overrides(DeepseekV3Config()) == sigmoid
    assert overrides(DeepseekV3Config(scoring_func="sigmoid", topk_method="noaux_tc")) is None
    assert overrides(MiniMaxM2Config()) == {"scoring_func": "sigmoid", "use_routing_bias": True}
    assert overrides(Qwen2Config()) is None
    untied = {"tie_word_embeddings": False}
    assert overrides(DeepseekV3Config(), hf_overrides=untied) == sigmoid | untied
    assert overrides(Qwen2Config(), hf_overrides=untied) == untied
