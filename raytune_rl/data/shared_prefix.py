"""Rows that begin alike as one packed row in which what they share stands once.

Group after group: [shared | own 1 | .. | own G]. A row that shares nothing is a group of its own, all of it
"shared". What a loss token is predicted from may lie in the shared part: its index is then the same for every
row of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_rl.data.collate import MicroBatch, check_rows
from raytune_rl.data.common_prefix import common_prefix


@dataclass(frozen=True)
class Together:
    """Rows that share their first `shared` tokens; all of its tokens where it is one row."""

    shared: int
    rows: tuple[int, ...]


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
    if not tokens:
        dummy = [np.array([pad_token_id])], [np.array([False])]
        return lay_out(*dummy, alone(dummy[0], [0]), n_rows=0)
    return lay_out(tokens, loss_masks, arranged(tokens, groups, prefixes))


def arranged(
    tokens: Sequence[NDArray],
    groups: Sequence[int] | NDArray[np.int64],
    prefixes: Sequence[int] | NDArray[np.int64],
) -> list[Together]:
    """Who shares what, in the order of each group's first row; arguments as in `collate_shared`."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(int(group), []).append(row)
    found: list[Together] = []
    for rows in members.values():
        shared = 0
        if len(rows) > 1:
            shared = common_prefix([tokens[row] for row in rows], min(int(prefixes[row]) for row in rows))
        found += [Together(shared, tuple(rows))] if shared else alone(tokens, rows)
    return found


def alone(tokens: Sequence[NDArray], rows: Sequence[int]) -> list[Together]:
    """Rows that share nothing."""
    return [Together(len(tokens[row]), (row,)) for row in rows]


def lay_out(
    tokens: Sequence[NDArray],
    loss_masks: Sequence[NDArray],
    groups: Sequence[Together],
    n_rows: int | None = None,
) -> MicroBatch:
    """The packed row.

    Args:
        tokens, loss_masks: As in `collate`, at least one row.
        groups: Every row once.
        n_rows: Of them that are real, the first ones; None: all.

    Raises:
        ValueError: As `collate`.
    """
    check_rows(tokens, loss_masks)
    pieces: list[NDArray] = []
    layout: list[tuple[int, ...]] = []
    at = 0
    places: dict[int, NDArray] = {}  # of each row's tokens in the packed row
    for group in groups:
        beginning = np.arange(at, at + group.shared)
        pieces.append(tokens[group.rows[0]][: group.shared])
        at += group.shared
        own = []
        for row in group.rows:
            length = len(tokens[row]) - group.shared
            places[row] = np.concatenate([beginning, np.arange(at, at + length)])
            pieces.append(tokens[row][group.shared :])
            at += length
            own.append(length)
        layout.append((group.shared, *(length for length in own if length)))
    positions = np.empty(at, dtype=np.int64)
    for row_places in places.values():
        positions[row_places] = np.arange(len(row_places))
    wanted = [np.flatnonzero(mask) for mask in loss_masks]
    predict = [places[row][where - 1] for row, where in enumerate(wanted)]
    targets = [tokens[row][where] for row, where in enumerate(wanted)]
    real = len(tokens) if n_rows is None else n_rows

    def integers(values: NDArray | list[int]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64))

    return MicroBatch(
        input_ids=integers(np.concatenate(pieces))[None],
        position_ids=integers(positions)[None],
        attention_mask=None,
        predict_index=integers(np.concatenate(predict)),
        targets=integers(np.concatenate(targets)),
        row_of=integers(np.repeat(np.arange(len(tokens)), [len(where) for where in wanted])),
        n_rows=real,
        row_ends=integers([int(places[row][-1]) for row in range(real)]),
        shared=tuple(layout),
    )
