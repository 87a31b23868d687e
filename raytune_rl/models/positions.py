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
from torch.nn.utils.rnn import pad_sequence

from raytune_rl.models.prefix_attention import Groups

_TOLD, _TYPES = "video_grid_thw", "mm_token_type_ids"


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
    if not _counts_along_axes(base, inputs) or _TOLD not in inputs:
        return None
    return continued(_own(base, input_ids, attention_mask, inputs), inputs[_TYPES], attention_mask)


def shared_positions(base: Any, input_ids: Tensor, shared: Groups, inputs: dict[str, Any]) -> Tensor | None:
    """Positions of rows that share their beginnings, and with them all their media.

    Args:
        base: The model without its head.
        input_ids: int64 [1, T], in the layout of `prefix_attention`.
        shared: How the rows lie.
        inputs: What else the model is given.

    Returns:
        int64 [axes, 1, T]: of what is shared as the model counts it, and of each row's own tokens one by one
        after its largest; or None where the model counts along one axis.
    """
    if not _counts_along_axes(base, inputs):
        return None
    sizes = [sum(group) for group in shared]
    beginnings = [
        [part[: group[0]] for part, group in zip(whole[0].split(sizes), shared, strict=True)]
        for whole in (input_ids, inputs[_TYPES])
    ]
    ids, types = (pad_sequence(parts, batch_first=True) for parts in beginnings)
    mask = pad_sequence([torch.ones_like(part) for part in beginnings[0]], batch_first=True)
    known = {**inputs, _TYPES: types}
    positions = positions_with_videos(base, ids, mask, known)
    if positions is None:
        positions = _own(base, ids, mask, known)
    pieces = []
    for number, (prefix, *own) in enumerate(shared):
        beginning = positions[:, number, :prefix]
        pieces.append(beginning)
        after = beginning.max() + 1
        steps = torch.arange(max(own, default=0), device=ids.device) + after
        pieces += [steps[:length].expand(len(beginning), -1) for length in own]
    return torch.cat(pieces, dim=1)[:, None]


def _counts_along_axes(base: Any, inputs: dict[str, Any]) -> bool:
    return hasattr(base, "get_rope_index") and _TYPES in inputs


def _own(base: Any, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    """Positions as the model itself counts them."""
    known = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    names = inspect.signature(base.get_rope_index).parameters
    positions: Tensor = base.get_rope_index(**{name: known[name] for name in names if name in known})[0]
    return positions


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
