"""Limits of vLLM with a model: set otherwise where the user left it open, refused where not."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from raytune_rl.config import InferConfig, RLHFConfig, resolved
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.protocol.model import Traits

Config = TypeVar("Config", bound=RLHFConfig | InferConfig)

DELTA_HEADS = (64, 128)
"""Widths that vLLM's CPU kernel of gated delta nets takes."""


def fit(config: Config, traits: Traits, on_gpu: bool, takes_media: bool = False) -> tuple[Config, list[str]]:
    """The settings with which an engine starts, and a sentence for each that was changed.

    Args:
        config: Of the run. What the user gave in it stays.
        traits: Of the model.
        on_gpu: There vLLM has fewer limits.
        takes_media: Whether the model does.

    Raises:
        ConfigError: The user's own setting keeps the engine from starting.
        ModelError: No setting would let it sample.
    """
    if not on_gpu and traits.delta_head not in (0, *DELTA_HEADS):
        raise ModelError(
            f"the model's linear attention has heads of {traits.delta_head} (linear_key_head_dim), and on a "
            "CPU "
            f"vLLM computes those of {' and '.join(map(str, DELTA_HEADS))} only: sample on a GPU, or make a "
            "tiny "
            "model for a trial with heads of 64"
        )
    if not on_gpu and traits.not_on_cpu:
        raise ModelError(f"vLLM cannot sample from this model on a CPU: {traits.not_on_cpu}. Sample on a GPU")
    changes: dict[str, Any] = {}
    notices = []

    def choose(name: str, value: Any, given: Any, why: str) -> None:
        written = str(value).lower() if isinstance(value, bool) else value
        if config.is_set(name) and given is not None and given != value:
            raise ConfigError(
                f"--{name} {str(given).lower()}: {why}. Write --{name} {written}, or leave it out."
            )
        if given != value:
            changes[name] = value
            notices.append(f"{why}: --{name} {written} is used")

    if isinstance(config, RLHFConfig) and config.train_type == "lora":
        of_what = None if traits.serves_adapters else "this model"
        if traits.experts and not on_gpu:
            of_what = "mixtures of experts on a CPU"
        if of_what is not None:
            why = f"vLLM serves no adapters of {of_what}, so merged weights travel"
            choose("vllm_enable_lora", False, config.vllm_enable_lora, why)
    if isinstance(config, RLHFConfig) and takes_media and _keeps_half_written(config):
        why = "half-written completions would go on with media as the old weights saw them"
        choose("rollout_in_flight", "recompute", config.rollout_in_flight, why)
    if on_gpu:
        return cast(Config, config.model_copy(update=changes)), notices
    if traits.recurrent:
        why = "vLLM shares no prompts of models with recurrent layers on a CPU"
        choose("vllm_enable_prefix_caching", False, config.vllm_enable_prefix_caching, why)
    if traits.bfloat16:
        why = "vLLM computes this model's attention on a CPU in bfloat16 only; a policy follows its engine"
        choose("torch_dtype", "bfloat16", config.torch_dtype, why)
    return cast(Config, config.model_copy(update=changes)), notices


def _keeps_half_written(config: RLHFConfig) -> bool:
    """Whether completions go on with the cache of older weights when new ones come."""
    return resolved.max_staleness(config) > 0 and config.rollout_in_flight == "keep"
