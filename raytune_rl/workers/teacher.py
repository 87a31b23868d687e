"""The teacher worker: what a frozen model would have said to every token that the policy sampled.

The model is computed by Transformers, as the policy is, or served by vLLM, over several GPUs where one does
not hold it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.distillation import Advice
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.model import ScoreSettings, Settled
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers import opinions
from raytune_rl.workers.frozen import FrozenWorker
from raytune_rl.workers.imports import SAMPLING
from raytune_rl.workers.probed import Probed

if TYPE_CHECKING:
    from raytune_rl.workers.served_model import ServedModel


class TeacherWorker(FrozenWorker):
    """A copy of a teacher."""

    role: ClassVar[str] = "teacher"

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return self._model.logprobs(batch)

    def advise(self, batch: RowBatch, advice: Advice) -> tuple[NDArray[np.float64], Columns]:
        """See `opinions.advised`."""
        return opinions.advised(self._model, batch, advice)

    def distributions(self, batch: RowBatch, k: int) -> tuple[int, Columns]:
        """See `opinions.distributions`."""
        return opinions.distributions(self._model, batch, k)


class ServedTeacherWorker(Probed):
    """A copy of a teacher that vLLM serves: it has weights that stay, and no state.

    Args:
        spec: Of the engine.
        settings: How log-probs are taken.
    """

    STAGE = SAMPLING.name

    def __init__(self, spec: EngineSpec, settings: ScoreSettings) -> None:
        # vLLM computes in the thread that made it: in another one OpenMP may have other threads, which its
        # kernels refuse.
        self._thread = ThreadPoolExecutor(1, "engine")
        self._model = self._thread.submit(self._build, spec, settings).result()

    def _build(self, spec: EngineSpec, settings: ScoreSettings) -> ServedModel:
        from raytune_rl.workers.served_model import ServedModel

        return ServedModel(spec, settings)

    def ping(self) -> Settled:
        """Proves that the engine is up; rows are asked about one by one."""
        return Settled("padded")

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return self._thread.submit(self._model.logprobs, batch).result()

    def advise(self, batch: RowBatch, advice: Advice) -> tuple[NDArray[np.float64], Columns]:
        """See `opinions.advised`."""
        return self._thread.submit(opinions.advised, self._model, batch, advice).result()

    def distributions(self, batch: RowBatch, k: int) -> tuple[int, Columns]:
        """See `opinions.distributions`."""
        return self._thread.submit(opinions.distributions, self._model, batch, k).result()
