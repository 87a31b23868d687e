"""The reference worker: log-probs under the model that the KL term refers to."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers.frozen import FrozenWorker


class ReferenceWorker(FrozenWorker):
    """A copy of the model training started from, its starting adapters included."""

    role: ClassVar[str] = "reference"

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return self._model.logprobs(batch)
