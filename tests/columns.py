"""Columns and micro-batches made of a few rows, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raytune_rl.data.collate import Layout, MicroBatch, collate
from raytune_rl.data.media_table import MediaWriter, Medium
from raytune_rl.protocol.columns import Columns, Ragged


def collate_rows(
    tokens: Ragged, loss_mask: Ragged, rows: Sequence[int], *, layout: Layout, pad_token_id: int
) -> MicroBatch:
    """`collate` for the given rows of two columns with the same offsets."""
    return collate(
        [tokens[row] for row in rows],
        [loss_mask[row] for row in rows],
        layout=layout,
        pad_token_id=pad_token_id,
    )


def media_columns(rows: Iterable[Sequence[Medium]]) -> Columns:
    """The columns for the media of rows, in memory."""
    writer = MediaWriter()
    for row in rows:
        writer.append(row)
    return writer.close()
