"""What rows of tokens have in common at their beginning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def common_prefix(rows: Sequence[NDArray], at_most: int | None = None) -> int:
    """How many leading tokens all rows have in common, up to `at_most`, and one less than the shortest has:
    every row keeps a token of its own."""
    length = min(len(row) - 1 for row in rows)
    if at_most is not None:
        length = min(length, at_most)
    for row in rows[1:]:
        differ = np.flatnonzero(row[:length] != rows[0][:length])
        length = int(differ[0]) if len(differ) else length
    return length
