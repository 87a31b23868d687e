"""What vLLM reads from a model's configuration and Transformers leaves out when it writes one.

Published configurations have these fields. Those of models made from Transformers' classes do not, and
vLLM then computes another model, or does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    # Transformers' routers of these know no other score; vLLM takes softmax and no bias unless told.
    "deepseek_v3": lambda config: {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "minimax_m2": lambda config: {"scoring_func": "sigmoid", "use_routing_bias": True},
    # By the names of the first LFM2 configurations.
    "lfm2": lambda config: {"block_dim": config.hidden_size, "conv_dim": config.hidden_size},
}


def fields_for_vllm(config: Any) -> dict[str, Any]:
    """Fields to be added to a configuration before vLLM reads it, with what Transformers computes.

    Args:
        config: Transformers' configuration.
    """
    fields = _FIELDS.get(config.model_type, lambda _: {})(config)
    return {name: value for name, value in fields.items() if getattr(config, name, None) is None}
