"""A frozen language model in a worker: what reference and teachers are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, TunerSettings
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers import scoring
from raytune_rl.workers.offload import Frozen, empty_cache

SMALL_VOCABULARY, USUAL_TOP = 1024, 64
"""See `FrozenModel.usual_top`."""


class FrozenModel:
    """A model that is only asked.

    Args:
        spec: Which one; its adapters are put on it.
        settings: How log-probs are taken.

    Attributes:
        scorer: The module; see `scoring.scorer_of`.
        settings: As given.
        settled: How its rows are laid out.
    """

    def __init__(self, spec: ModelSpec, settings: ScoreSettings) -> None:
        from raytune_rl.models.tuner import apply_tuner
        from raytune_rl.workers import isolation

        loaded = scoring.load(spec)
        model: Any = loaded.model
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), scoring.adapters(spec)).model
        self._media = scoring.media_collator(spec, loaded, always=False)
        self.settings = settings
        self.scorer = scoring.scorer_of(model, "logprobs").eval().requires_grad_(False)
        self.settled = isolation.settle_rows(self.scorer, spec, self._media)
        self._spec = replace(spec, layout=self.settled.layout)
        self._weights = Frozen(self.scorer.parameters())

    def offload(self, weights: bool) -> None:
        """Moves its weights to the CPU if they are wanted away, and gives back what the allocator keeps."""
        if weights:
            self._weights.away()
        empty_cache()

    def reload(self) -> None:
        """Brings back what `offload` moved."""
        self._weights.back()

    def changed(self) -> None:
        """Its weights were changed in place."""
        self._weights.changed()

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return scoring.score(self.scorer, batch, self._spec, self.settings, self._media)

    @property
    def usual_top(self) -> int:
        """Likeliest tokens that stand for a distribution: all of a small vocabulary, else 64."""
        size = self.scorer.model.config.get_text_config().vocab_size
        return size if size <= SMALL_VOCABULARY else USUAL_TOP

    def likeliest(
        self, batch: RowBatch, k: int
    ) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """Of each row its number, and ids and log-probs of the k likeliest tokens at each loss token, each
        `[n, k]` (fewer where the vocabulary has fewer).
        """
        import torch

        rows = scoring.read_rows(batch, self.settings.timeout_s)
        scoring.expect_media(rows, batch, self._media)
        with torch.no_grad():
            for members in batch.micro_batches:
                micro = scoring.micro_batch(rows, members, self._spec.layout, self._media)
                top = self.scorer(
                    **scoring.forward_inputs(micro),
                    temperature=self.settings.temperature,
                    disallowed_token_ids=self.settings.disallowed_token_ids,
                    top=k,
                ).top
                counts = np.bincount(micro.row_of.cpu().numpy(), minlength=len(members))
                ends = np.cumsum(counts)[:-1]
                ids = np.split(top[0].cpu().numpy().astype(np.int32), ends)
                logprobs = np.split(top[1].cpu().numpy(), ends)
                yield from zip(members, ids, logprobs, strict=True)
