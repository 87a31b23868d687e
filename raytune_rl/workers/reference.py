"""The reference worker: log-probs under the frozen model that the KL term refers to."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.ragged import Columns
from raytune_rl.data.rows import RowBatch
from raytune_rl.workers import scoring
from raytune_rl.workers.scoring import ModelSpec, ScoreSettings


class ReferenceWorker:
    """A frozen copy of the model training started from, its starting adapters included. Stateless."""

    def __init__(self, spec: ModelSpec, settings: ScoreSettings) -> None:
        from raytune_rl.models.scorer import TokenScorer
        from raytune_rl.models.settings import TunerSettings
        from raytune_rl.models.tuner import apply_tuner

        loaded = scoring.load(spec)
        model: Any = loaded.model
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), spec.adapters).model
        self._images = scoring.image_collator(spec, loaded, always=False)
        self._spec = spec
        self._settings = settings
        self._scorer = TokenScorer(model).eval().requires_grad_(False)

    def ping(self) -> dict[str, Any]:
        """Proves that the model is loaded."""
        return {"pid": os.getpid()}

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return scoring.score(self._scorer, batch, self._spec, self._settings, self._images)
