"""How answers are drawn and how long they may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import InferConfig
from raytune_rl.errors import ConfigError
from raytune_rl.infer.settings import CONTEXT, Shape, context_length, generation_settings, sampling_of

SHAPE = Shape(max_positions=32768, cache_per_token=1024)


def config(**settings: Any) -> InferConfig:
    return InferConfig(**{"model": "m", **settings})


def test_a_model_that_does_not_sample_is_greedy_unless_the_user_says() -> None:
    own = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}
    assert sampling_of(config(), own, 100).temperature == 0
    assert sampling_of(config(), own, 100).repetition_penalty == 1.1
    assert sampling_of(config(temperature=0.3), own, 100).temperature == 0.3


def test_the_models_own_settings_hold_where_none_are_given() -> None:
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    found = sampling_of(config(top_p=0.5, max_new_tokens=7), own, 100)
    assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0.7, 0.5, 20, 7)
    assert sampling_of(config(), {"do_sample": True, "top_k": 0}, 100).top_k == -1
    assert sampling_of(config(), {}, 100).max_tokens == 100


def test_generation_settings_are_read_or_absent(tmp_path: Path) -> None:
    assert generation_settings(str(tmp_path)) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    assert generation_settings(str(tmp_path)) == {"top_k": 3}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        generation_settings(str(tmp_path))


def test_context_is_what_the_user_says_else_what_is_needed() -> None:
    assert context_length(config(), SHAPE) == CONTEXT
    assert context_length(config(vllm_max_model_len=500), SHAPE) == 500
    assert context_length(config(), Shape(1024, 1)) == 1024
    assert context_length(config(max_new_tokens=6000), SHAPE) == 12000
    assert context_length(config(max_new_tokens=50), SHAPE, longest_prompt=70) == 120
    with pytest.raises(ConfigError, match=r"longest row has 1000 tokens.*--max_new_tokens"):
        context_length(config(max_new_tokens=50), Shape(1024, 1), longest_prompt=1000)
    with pytest.raises(ConfigError, match="the model takes 1024 tokens at most"):
        context_length(config(vllm_max_model_len=2000), Shape(1024, 1))


def test_a_cache_holds_a_few_whole_conversations() -> None:
    assert Shape(None, 1024).cache_bytes(2**16, 4) == 4 * 2**16 * 1024 * 4
    assert Shape(None, 1).cache_bytes(10, 2) == 256 * 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "--model or --adapters is required"),
        ({"result_path": "a.jsonl"}, "--result_path is for the answers"),
        ({"top_k": 0}, "--top_k 0"),
        ({"vllm_max_model_len": 10, "max_new_tokens": 10}, "--vllm_max_model_len 10 must hold"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
