"""What a teacher says of rows, whoever computes its log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, Advice
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ScoreSettings
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers.scoring import read_rows

SMALL_VOCABULARY, USUAL_TOP = 1024, 64
"""See `usual_top`."""


class Asked(Protocol):
    """A model that is only asked."""

    settings: ScoreSettings
    """How log-probs are taken."""

    @property
    def vocabulary(self) -> int:
        """Tokens that its distribution is over."""
        ...

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        ...

    def likeliest(
        self, batch: RowBatch, k: int
    ) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """Of each row its number, and ids and log-probs of the k likeliest tokens at each loss token, each
        `[n, k]` (fewer where the vocabulary has fewer).
        """
        ...


def usual_top(vocabulary: int) -> int:
    """Likeliest tokens that stand for a distribution: all of a small vocabulary, else 64."""
    return vocabulary if vocabulary <= SMALL_VOCABULARY else USUAL_TOP


def advised(model: Asked, batch: RowBatch, advice: Advice) -> tuple[NDArray[np.float64], Columns]:
    """What the advantages of rows become by a teacher's opinion.

    Args:
        model: The teacher.
        batch: Rows with the extra column "old_logprobs", and what they earned so far: the extra column
            "advantages", else the scalar "advantage".
        advice: How.

    Returns:
        Of each row the sums over its tokens of the reverse KL's estimate, nats, and of the new advantages,
        and how many tokens it has, float64 `[n, 3]`; and {"advantages": Ragged float32}.
    """
    _, scored = model.logprobs(batch)
    rows = read_rows(batch, model.settings.timeout_s)
    own: Ragged = scored["logprobs"]  # type: ignore[assignment]
    sums, made = np.zeros((len(batch), 3)), []
    for row in range(len(batch)):
        old = rows.extra("old_logprobs", row)
        earned = (
            rows.extra("advantages", row)
            if rows.has_extra("advantages")
            else np.full(len(old), batch.scalars["advantage"][row], dtype=np.float32)
        )
        new = advice(earned, own[row], old)
        made.append(new)
        sums[row] = (old.astype(np.float64) - own[row]).sum(), new.sum(dtype=np.float64), len(old)
    return sums, {"advantages": Ragged.from_rows(made, np.float32)}


def distributions(model: Asked, batch: RowBatch, k: int) -> tuple[int, Columns]:
    """What a teacher would have said at every token of rows.

    Args:
        model: The teacher.
        batch: The rows.
        k: So many tokens; 0: as many as `usual_top` says.

    Returns:
        The number of rows, and the columns `distillation.TEACHER_COLUMNS`: ids as Ragged int32 and log-probs
        as Ragged float32 of its k likeliest tokens, one token after the other.
    """
    ids: list[Any] = [None] * len(batch)
    logprobs: list[Any] = [None] * len(batch)
    for row, own_ids, own_logprobs in model.likeliest(batch, k or usual_top(model.vocabulary)):
        ids[row], logprobs[row] = own_ids.ravel(), own_logprobs.ravel()
    made = Ragged.from_rows(ids, np.int32), Ragged.from_rows(logprobs, np.float32)
    return len(batch), dict(zip(TEACHER_COLUMNS, made, strict=True))
