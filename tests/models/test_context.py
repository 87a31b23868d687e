"""The longest sequence of a model, as vLLM works it out."""

from __future__ import annotations

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen2Config

from raytune_rl.models.context import longest_context

THETA = 10000.0


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (Qwen2Config(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=256), 256),
        (MambaConfig(), None),
        (
            LlamaConfig(
                max_position_embeddings=512,
                rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": THETA},
            ),
            2048,
        ),
        (
            LlamaConfig(
                max_position_embeddings=512,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA},
            ),
            1024,
        ),
        (
            Qwen2Config(
                max_position_embeddings=2048,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": THETA,
                    "original_max_position_embeddings": 512,
                },
            ),
            2048,
        ),
        (Gemma3TextConfig(max_position_embeddings=1024), 1024),
    ],
)
def test_the_longest_sequence(config: object, tokens: int | None) -> None:
    assert longest_context(config) == tokens
