"""Arguments that reach vLLM's EngineArgs beside what a run decides itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
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


def test_an_eager_engine_on_a_cpu_compiles_nothing() -> None:
    from raytune_rl.workers.vllm_engine import compile_nothing_in_vain

    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    spec = EngineSpec("model", "float32", 64, "store", 1.0, enforce_eager=True)
    try:
        for eager in (False, True):
            compile_nothing_in_vain(replace(spec, enforce_eager=eager))
            torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
            assert len(compiled) == 1, "only by the engine that is not"
    finally:
        torch.compiler.set_stance("default")
