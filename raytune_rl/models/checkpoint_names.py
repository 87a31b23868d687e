"""Weights under the names of a Hugging Face checkpoint, from those that they have in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from raytune_rl.models.sharding import shape_of

# Transformers 5 renames the inner model of Qwen2-Audio and its kin once for itself and once for the whole. It
# loads both forms; the hubs and vLLM know the one.
_TWICE, _ONCE = "language_model.model.model.", "language_model.model."


def checkpoint_form(hf: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' own reverse of what it does in loading, see `revert_weight_conversion`.

    Args:
        hf: the PreTrainedModel.
        tensors: by their names in it; a part of them, or all.
    """
    made = revert_weight_conversion(hf, tensors)
    return {name.replace(_TWICE, _ONCE): tensor for name, tensor in made.items()}


def renames_twice(hf: Any) -> bool:
    """Whether `save_pretrained` would write names that no other program knows."""
    names = {
        name: torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in hf.state_dict(keep_vars=True).items()
    }
    made = revert_weight_conversion(hf, names)
    return any(_TWICE in name for name in made)
