"""Which of vLLM's classes take adapters, read from its source, as vLLM itself says it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raytune_rl.models.vllm_source import serves_adapters


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen2ForCausalLM",
        "Cohere2ForCausalLM",  # by a base of another name in the same file
        "Qwen3MoeForCausalLM",  # by a base of another file
        "GPT2LMHeadModel",
        "FalconForCausalLM",
        "StableLmForCausalLM",
        "Qwen2AudioForConditionalGeneration",
    ],
)
def test_it_says_what_vllm_says(architecture: str) -> None:
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    vllms = ModelRegistry._try_load_model_cls(architecture)
    assert vllms is not None
    assert serves_adapters(SimpleNamespace(architectures=[architecture])) == supports_lora(vllms)


def test_what_cannot_be_told_is_left_to_the_engine() -> None:
    assert serves_adapters(SimpleNamespace(architectures=["NobodysForCausalLM"]))
    assert serves_adapters(SimpleNamespace(architectures=None))
    assert serves_adapters(SimpleNamespace(architectures=["Olmo2ForCausalLM"]))  # vLLM's Transformers backend
