"""How long a sequence a model takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length",
    "max_seq_length", "max_target_positions",
)  # fmt: skip
# Of these the config's number is what comes of the scaling; of others (linear, dynamic) it is what is scaled.
_SCALED_ALREADY = ("longrope", "su", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")

ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""Environment variable, vLLM's: 1 where the user says that models take more than their configs do."""


def longer_allowed() -> bool:
    """Whether the user says that models take more than their configs do."""
    return os.environ.get(ALLOW_LONG, "").lower() in ("1", "true")


def longest_context(text_config: Any) -> int | None:
    """Tokens of the longest sequence, as vLLM works them out from a Transformers config of the text part;
    None where the config does not say.
    """
    lengths = [getattr(text_config, key, None) for key in _KEYS]
    own = getattr(text_config, "model_max_length", None)
    limits = [int(own)] if own else [int(value) for value in lengths if value is not None]
    if not limits:
        return None
    factor = 1.0
    for rope in _ropes(text_config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in _SCALED_ALREADY and "gemma3" not in str(getattr(text_config, "model_type", "")):
            factor = rope.get("factor") or factor
    return int(min(limits) * factor)


def _ropes(text_config: Any) -> Iterator[Mapping[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    given = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    yield from nested or [given]
