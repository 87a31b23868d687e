"""The teacher worker: what a frozen model would have said to every token that the policy sampled."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, Advice
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers.frozen import FrozenWorker
from raytune_rl.workers.scoring import read_rows


class TeacherWorker(FrozenWorker):
    """A copy of a teacher."""

    role: ClassVar[str] = "teacher"

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return self._model.logprobs(batch)

    def advise(self, batch: RowBatch, advice: Advice) -> tuple[NDArray[np.float64], Columns]:
        """What the advantages of rows become by this teacher's opinion.

        Args:
            batch: Rows with the extra column "old_logprobs", and what they earned so far: the extra column
                "advantages", else the scalar "advantage".
            advice: How.

        Returns:
            Of each row the sums over its tokens of the reverse KL's estimate, nats, and of the new
            advantages, and how many tokens it has, float64 `[n, 3]`; and {"advantages": Ragged float32}.
        """
        _, scored = self._model.logprobs(batch)
        rows = read_rows(batch, self._model.settings.timeout_s)
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

    def distributions(self, batch: RowBatch, k: int) -> tuple[int, Columns]:
        """What this teacher would have said at every token of rows.

        Returns:
            The number of rows, and the columns `distillation.TEACHER_COLUMNS`: ids as Ragged int32 and
            log-probs as Ragged float32 of its k likeliest tokens, one token after the other.
        """
        ids: list[Any] = [None] * len(batch)
        logprobs: list[Any] = [None] * len(batch)
        for row, own_ids, own_logprobs in self._model.likeliest(batch, k or self._model.usual_top):
            ids[row], logprobs[row] = own_ids.ravel(), own_logprobs.ravel()
        made = Ragged.from_rows(ids, np.int32), Ragged.from_rows(logprobs, np.float32)
        return len(batch), dict(zip(TEACHER_COLUMNS, made, strict=True))
