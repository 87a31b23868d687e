"""Rows that begin alike as one packed row in which what they share stands once.

Group after group: [shared | own 1 | .. | own G]. A row that shares nothing is a group of its own, all of it
"shared". What a loss token is predicted from may lie in the shared part: its index is then the same for every
row of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_rl.data.collate import MicroBatch, check_rows
from raytune_rl.data.common_prefix import common_prefix


def collate_shared(
    tokens: Sequence[NDArray],
    loss_masks: Sequence[NDArray],
    groups: Sequence[int] | NDArray[np.int64],
    prefixes: Sequence[int] | NDArray[np.int64],
    *,
    pad_token_id: int,
) -> MicroBatch:
    """Lays rows out as one packed row with the beginnings that they share once.

    Args:
        tokens, loss_masks, pad_token_id: As in `collate`.
        groups: Number of each row's group.
        prefixes: Tokens that a row is said to share with the others of its group. What is not the same in all
            of them is not shared.

    Returns:
        Loss tokens in the order of the rows as given; the packed row itself is ordered by groups.

    Raises:
        ValueError: As `collate`.
    """
    check_rows(tokens, loss_masks)
    if not tokens:
        tokens, loss_masks = [np.array([pad_token_id])], [np.array([False])]
        groups, prefixes, n_rows = [0], [0], 0
    else:
        n_rows = len(tokens)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(int(group), []).append(row)
    pieces: list[NDArray] = []
    layout: list[tuple[int, ...]] = []
    at = 0
    places: dict[int, NDArray] = {}  # of each row's tokens in the packed row
    for rows in _apart(members, tokens, prefixes):
        shared = _shared_by(rows, tokens, prefixes)
        beginning = np.arange(at, at + shared)
        pieces.append(tokens[rows[0]][:shared])
        at += shared
        own = []
        for row in rows:
            length = len(tokens[row]) - shared
            places[row] = np.concatenate([beginning, np.arange(at, at + length)])
            pieces.append(tokens[row][shared:])
            at += length
            own.append(length)
        layout.append((shared, *(length for length in own if length)))
    positions = np.empty(at, dtype=np.int64)
    for row_places in places.values():
        positions[row_places] = np.arange(len(row_places))
    wanted = [np.flatnonzero(mask) for mask in loss_masks]
    counts = [len(where) for where in wanted]
    predict = [places[row][where - 1] for row, where in enumerate(wanted)]
    targets = [tokens[row][where] for row, where in enumerate(wanted)]
    ends = [places[row][-1] for row in range(n_rows)]

    def integers(values: NDArray | list[int]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64))

    return MicroBatch(
        input_ids=integers(np.concatenate(pieces))[None],
        position_ids=integers(positions)[None],
        attention_mask=None,
        predict_index=integers(np.concatenate(predict)),
        targets=integers(np.concatenate(targets)),
        row_of=integers(np.repeat(np.arange(len(tokens)), counts)),
        n_rows=n_rows,
        row_ends=integers(ends),
        shared=tuple(layout),
    )


def _apart(
    members: dict[int, list[int]], tokens: Sequence[NDArray], prefixes: Sequence[int] | NDArray[np.int64]
) -> list[list[int]]:
    """The groups, and each row alone of those that have nothing in common."""
    found: list[list[int]] = []
    for rows in members.values():
        found += [rows] if _shared_by(rows, tokens, prefixes) else [[row] for row in rows]
    return found


def _shared_by(
    rows: Sequence[int], tokens: Sequence[NDArray], prefixes: Sequence[int] | NDArray[np.int64]
) -> int:
    if len(rows) == 1:
        return len(tokens[rows[0]])
    return common_prefix([tokens[row] for row in rows], min(int(prefixes[row]) for row in rows))
