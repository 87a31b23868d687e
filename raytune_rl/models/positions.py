"""Positions of tokens after a video, for models that count along several axes (M-RoPE).

Qwen2-VL (Wang et al. 2024, section 2.1) begins each piece of a row, text or medium, one after the largest
position of the piece before. Transformers 5 goes on after the height or width of a video instead, though its
frames may reach further in time: not as the model was trained, and not as vLLM counts. Where both agree,
nothing changes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_TOLD = "video_grid_thw"


def positions_with_videos(
    base: Any, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]
) -> Tensor | None:
    """Positions of rows of which some have a video.

    Args:
        base: The model without its head.
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 1 on tokens.
        inputs: What else the model is given.

    Returns:
        int64 [axes, B, T], or None where the model's own are right: no row has a video, or it counts along
        one axis.
    """
    own = getattr(base, "get_rope_index", None)
    if own is None or _TOLD not in inputs or "mm_token_type_ids" not in inputs:
        return None
    known = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    names = inspect.signature(own).parameters
    positions = own(**{name: known[name] for name in names if name in known})[0]
    return continued(positions, inputs["mm_token_type_ids"], attention_mask)


def continued(positions: Tensor, types: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Moves each piece of each row to begin one after the largest position before it.

    Args:
        positions: int64 [axes, B, T]; the first axis begins a piece with its start.
        types: int [B, T], which kind of piece a token belongs to.
        attention_mask: int64 [B, T], or None: all are tokens.

    Returns:
        int64 [axes, B, T]; padding keeps what it had.
    """
    moved = positions.clone()
    for row in range(positions.shape[1]):
        kept = torch.ones_like(types[row], dtype=torch.bool)
        if attention_mask is not None:
            kept = attention_mask[row].bool()
        mine, kinds = positions[:, row, kept], types[row, kept]
        borders = torch.nonzero(kinds[1:] != kinds[:-1]).flatten() + 1
        start = 0
        pieces = []
        for piece in torch.tensor_split(mine, borders.cpu(), dim=1):
            shifted = piece + (start - piece[0, 0])
            start = int(shifted.max()) + 1
            pieces.append(shifted)
        moved[:, row, kept] = torch.cat(pieces, dim=1)
    return moved
