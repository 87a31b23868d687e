"""How answers are drawn and how long they may be: what the user said, else what the model says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_rl.config import InferConfig
from raytune_rl.data.model_tokens import as_ids
from raytune_rl.errors import ConfigError
from raytune_rl.models.context import longer_allowed, longest_context
from raytune_rl.protocol.rollout import Sampling

CONTEXT = 8192
"""Tokens of a conversation where nobody says: a larger cache than most chats need would cost memory."""
LEAST_CACHE = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """The shape of a model that its cache depends on.

    Attributes:
        max_positions: The longest sequence it takes, tokens; None if it does not say.
        cache_per_token: Keys and values of one token in all layers, numbers.
    """

    max_positions: int | None
    cache_per_token: int

    @classmethod
    def of(cls, text_config: Any) -> Shape:
        """From a Transformers config of the text part."""
        heads = text_config.num_attention_heads
        width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        pairs = getattr(text_config, "num_key_value_heads", None) or heads
        per_token = 2 * text_config.num_hidden_layers * pairs * width
        return cls(longest_context(text_config), per_token)

    def cache_bytes(self, context: int, bytes_per_number: int) -> int:
        """A cache on a CPU for a few conversations of full length."""
        return max(LEAST_CACHE, 4 * context * self.cache_per_token * bytes_per_number)


def context_length(config: InferConfig, shape: Shape, longest_prompt: int | None = None) -> int:
    """Tokens that a conversation and its answer may have together.

    Args:
        config: `vllm_max_model_len` and `max_new_tokens`.
        shape: Of the model.
        longest_prompt: Of the rows to answer, tokens; None for a chat.

    Raises:
        ConfigError: The longest row leaves no room for an answer, or more is asked for than the model takes.
    """
    most = None if longer_allowed() else shape.max_positions
    if most is not None and (config.vllm_max_model_len or 0) > most:
        raise ConfigError(
            f"--vllm_max_model_len {config.vllm_max_model_len}: the model takes {most} tokens at most."
        )
    answer = config.max_new_tokens
    wanted = CONTEXT if longest_prompt is None or answer is None else longest_prompt + answer
    if longest_prompt is None and answer is not None:
        wanted = max(CONTEXT, 2 * answer)
    max_model_len = config.vllm_max_model_len or min(wanted, most or wanted)
    needed = (longest_prompt or 0) + (answer or 1)
    if longest_prompt is not None and needed > max_model_len:
        raise ConfigError(
            f"the longest row has {longest_prompt} tokens; with an answer of {answer or 'at least 1'} it "
            f"does not fit the {max_model_len} that the engine takes: lower --max_new_tokens, raise "
            f"--vllm_max_model_len (the model takes {most or 'any number of'} tokens), or shorten the row."
        )
    return max_model_len


def generation_settings(model: str) -> Mapping[str, Any]:
    """generation_config.json of a model's folder; empty if there is none."""
    file = Path(model) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return settings if isinstance(settings, dict) else {}


def sampling_of(config: InferConfig, generation: Mapping[str, Any], max_model_len: int) -> Sampling:
    """The user's settings over the model's. A model that does not sample is answered greedily."""
    own: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    own["repetition_penalty"] = 1.0
    for name in own:
        own[name] = own[name] if generation.get(name) is None else generation[name]
    if not generation.get("do_sample", False):
        own |= {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    for name in own:
        given = getattr(config, name)
        own[name] = own[name] if given is None else given
    own["top_k"] = int(own["top_k"]) or -1
    return Sampling(
        max_tokens=config.max_new_tokens or max_model_len,
        stop_words=config.stop_words,
        stop_token_ids=as_ids(generation.get("eos_token_id")),
        **own,
    )
