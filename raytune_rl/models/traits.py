"""Traits of a model's architecture that decide how an engine can be set up for it, read from its
configuration.
"""

from __future__ import annotations

from typing import Any

from raytune_rl.models.vllm_source import serves_adapters
from raytune_rl.protocol.model import Traits

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_STATE = ("mamba_d_state", "mamba_state_dim", "state_size", "ssm_state_size")


def traits_of(config: Any) -> Traits:
    """From Transformers' configuration."""
    return Traits(
        has_experts(config),
        recurrent(config),
        wants_bfloat16(config),
        delta_head(config),
        not_on_cpu(config),
        serves_adapters(config),
    )


def has_experts(config: Any) -> bool:
    """Whether it is a mixture of experts."""
    return bool(expert_counts(config))


def expert_counts(config: Any) -> set[int]:
    """How many experts a layer may have; empty where there are none."""
    text = config.get_text_config()
    return {count for name in _EXPERT_COUNTS if (count := getattr(text, name, None) or 0) > 1}


def recurrent(config: Any) -> bool:
    """Whether some of its layers keep a state or a window of inputs instead of keys and values."""
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    other = {
        layer_type
        for layer_type in layer_types
        if layer_type == "linear_attention" or not layer_type.endswith("attention")
    }
    return bool(other) or any(getattr(text, name, None) for name in _STATE)


def delta_head(config: Any) -> int:
    """Width of the heads of gated delta nets (Qwen3-Next, Qwen3.5); 0 without any."""
    text = config.get_text_config()
    linear = "linear_attention" in (getattr(text, "layer_types", None) or ())
    return int(getattr(text, "linear_key_head_dim", None) or 0) if linear else 0


def wants_bfloat16(config: Any) -> bool:
    """Whether vLLM computes it in bfloat16 only, on a CPU: gated delta nets, whose kernels there have no
    float32."""
    return bool(delta_head(config))


def not_on_cpu(config: Any) -> str:
    """Why vLLM 0.32 cannot sample from it on a CPU; empty if it can. Seen on tiny models (tests/families)."""
    if config.model_type == "minimax_m2":
        return "the router of its experts has no sigmoid there"
    return ""


def gpu_here() -> bool:
    """Whether this very machine has a GPU."""
    import torch

    return torch.cuda.is_available()
