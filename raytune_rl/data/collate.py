"""Rows to the tensors of one micro-batch, padded or packed.

After the backbone everything is flat over the N loss tokens, so the two layouts make no difference
downstream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_rl.data.microbatch import Layout


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass. B rows of T positions, N loss tokens.

    Attributes:
        input_ids: int64 `[B, T]`, padded on the right; packed: B is 1 and the rows follow each other.
        position_ids: int64 `[B, T]`, starting again at 0 at each row when packed; None leaves them to the
            model, which knows where its pictures stand.
        attention_mask: int64 `[B, T]`, or None when packed: the model keeps rows apart by the position ids,
            for which it must be called with `use_cache=False`.
        predict_index: int64 `[N]`, index into the flat `[B * T]` hidden states of the state that predicts
            each loss token, which is the one before it.
        targets: int64 `[N]`, the loss tokens.
        row_of: int64 `[N]`, the row of each loss token inside this micro-batch.
        n_rows: Number of real rows; 0 for a dummy micro-batch.
        row_ends: int64 `[n_rows]`, index of each real row's last token, flat as in `predict_index`.
        model_inputs: What else the model takes, by name: pixel_values and the like, in the order of the rows.
        shared: Of each group of rows that begin alike, how many tokens are there once for all of them, and
            how many of its own each row has behind those (`data.shared_prefix`); empty in other layouts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    predict_index: torch.Tensor
    targets: torch.Tensor
    row_of: torch.Tensor
    n_rows: int
    row_ends: torch.Tensor
    model_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: tuple[tuple[int, ...], ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            return {name: moved(one) for name, one in value.items()} if isinstance(value, Mapping) else value

        return MicroBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})


def collate(
    tokens: Sequence[NDArray], loss_masks: Sequence[NDArray], *, layout: Layout, pad_token_id: int
) -> MicroBatch:
    """Lays rows out as one micro-batch.

    Args:
        tokens: One int array a row, never empty. No rows at all make a dummy micro-batch of one pad token and
            N = 0.
        loss_masks: One bool array a row, as long as the row's tokens; False at index 0, which nothing
            predicts.
        layout: 'padded' or 'packed'.
        pad_token_id: Fills padded positions; they are masked, so any id of the vocabulary does.

    Raises:
        ValueError: Lengths differ, a row is empty, or a row's first token is marked as a loss token.
    """
    check_rows(tokens, loss_masks)
    if not tokens:
        return _assemble([np.array([pad_token_id])], [np.array([False])], layout, pad_token_id, n_rows=0)
    return _assemble(tokens, loss_masks, layout, pad_token_id, n_rows=len(tokens))


def check_rows(tokens: Sequence[NDArray], loss_masks: Sequence[NDArray]) -> None:
    """Raises ValueError as `collate` does."""
    if len(tokens) != len(loss_masks):
        raise ValueError(f"{len(tokens)} rows of tokens but {len(loss_masks)} loss masks")
    for number, (row, mask) in enumerate(zip(tokens, loss_masks, strict=True)):
        if len(row) == 0 or len(row) != len(mask):
            raise ValueError(f"row {number} has {len(row)} tokens and a loss mask of {len(mask)}")
        if mask[0]:
            raise ValueError(f"row {number} marks its first token as a loss token, but nothing predicts it")


def _assemble(
    tokens: Sequence[NDArray], loss_masks: Sequence[NDArray], layout: Layout, pad: int, *, n_rows: int
) -> MicroBatch:
    lengths = np.asarray([len(row) for row in tokens])
    if layout == "packed":
        starts = np.cumsum(lengths) - lengths
        input_ids = np.concatenate(tokens).astype(np.int64)[None, :]
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])[None, :]
        attention = None
    else:
        width = int(lengths.max())
        starts = np.arange(len(tokens)) * width
        input_ids = np.full((len(tokens), width), pad, dtype=np.int64)
        attention = np.zeros_like(input_ids)
        for number, row in enumerate(tokens):
            input_ids[number, : len(row)] = row
            attention[number, : len(row)] = 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int64), input_ids.shape).copy()
    places = [np.flatnonzero(mask) for mask in loss_masks]
    predict = np.concatenate([start + place - 1 for start, place in zip(starts, places, strict=True)])
    targets = np.concatenate([row[place] for row, place in zip(tokens, places, strict=True)])
    row_of = np.repeat(np.arange(len(tokens)), [len(place) for place in places])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if attention is None else torch.from_numpy(attention),
        predict_index=torch.from_numpy(predict.astype(np.int64)),
        targets=torch.from_numpy(targets.astype(np.int64)),
        row_of=torch.from_numpy(row_of.astype(np.int64)),
        n_rows=n_rows,
        row_ends=torch.from_numpy((starts + lengths - 1)[:n_rows].astype(np.int64)),
    )
