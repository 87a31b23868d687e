"""The channels of rows: the kinds of data that a mixture is made of, named by the column `channel`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.losses.sft import CHANNEL
from raytune_rl.data.example import Example
from raytune_rl.errors import DataError

MOST = 100
"""Channels of a set; each has a line in the log."""


def channel_of(example: Example) -> str | None:
    """The channel of a row; None if it has none."""
    name = example.extra.get("channel")
    return None if name is None else str(name)


def channel_values(
    names: Sequence[str | None],
) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """For each channel, which rows are of it.

    Args:
        names: The channel of each row; a row without one is of none.

    Returns:
        "channel:" and the name -> float64 `[n]`, 1 or 0; and a notice if no row has a channel.

    Raises:
        DataError: There are more than `MOST`.
    """
    place = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
    if len(place) > MOST:
        raise DataError(
            f"--enable_channel_loss true: the column 'channel' has {len(place)} different values, of which "
            f"each would be a line of the log; at most {MOST} can be: group them, or leave the flag out."
        )
    if not place:
        return {}, ("--enable_channel_loss true does nothing here: no row has the column 'channel'",)
    of_row = np.array([-1 if name is None else place[name] for name in names])
    return {CHANNEL + name: (of_row == number).astype(np.float64) for name, number in place.items()}, ()
