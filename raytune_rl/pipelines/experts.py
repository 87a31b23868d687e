"""An expert's answers in the steps of an online run, beside the policy's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.registry import EXPERT
from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import GRPOBatch
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.data.sampler import stretch
from raytune_rl.pipelines.demonstrations import demonstrated_rows
from raytune_rl.prepare.sets import token_sets
from raytune_rl.protocol.data import TokenSet
from raytune_rl.protocol.rows import ABSENT, Prefixes, RowPointer, TrainBatch


@dataclass(frozen=True)
class Experts:
    """Which rows come into which step, and how much they weigh.

    Attributes:
        rows: The conversations.
        count: Of them in a step.
        share: Optimizer step, from 0 -> the weight of their mean loss, beside 1 less that of the policy's
            own.
        seed, shuffle: Of the order.
    """

    rows: TokenSet
    count: int
    share: Callable[[int], float]
    seed: int
    shuffle: bool

    def mixed(self, batch: TrainBatch, step: int) -> TrainBatch:
        """The batch of a step with the expert's rows behind its own; without them where they weigh nothing.

        Args:
            batch: The policy's own answers, weighed for themselves.
            step: Its number, from 0: the same rows in every run of the seed.
        """
        share, own = self.share(step), len(batch)
        weight = batch.scalars["weight"] * (1 - share)
        if share == 0:
            return batch.with_scalars(weight=weight, **{EXPERT: np.zeros(own)})
        chosen = stretch(len(self.rows), self.count * step, self.count, self.seed, self.shuffle).tolist()
        added = self.rows.batch(chosen)
        scalars: Mapping[str, ArrayLike] = {
            **{name: np.zeros(self.count) for name in batch.scalars},
            "weight": share * row_weights(self.rows.loss_lengths[chosen], "tokens"),
            EXPERT: np.ones(self.count),
        }
        before = {**batch.scalars, "weight": weight, EXPERT: np.zeros(own)}
        media = [RowPointer(self.rows.columns, row) for row in chosen]
        prefixes = None
        if batch.prefixes is not None:  # the expert's rows begin like no others
            groups = batch.prefixes.groups.max(initial=0) + 1 + np.arange(self.count)
            prefixes = Prefixes(
                np.concatenate([batch.prefixes.groups, groups]),
                np.concatenate([batch.prefixes.lengths, np.zeros(self.count, dtype=np.int64)]),
            )
        return TrainBatch(
            [*batch.rows, *added.rows],
            np.concatenate([batch.lengths, added.lengths]),
            {
                name: [*places, *(media if name == ROW_COLUMN else [ABSENT] * self.count)]
                for name, places in batch.columns.items()
            },
            {name: np.concatenate([before[name], np.asarray(scalars[name])]) for name in before},
            prefixes,
        )


def experts_of(
    config: RLHFConfig,
    batch: GRPOBatch,
    share: Callable[[int], float],
    quarantine: Path,
    *,
    one_machine: bool,
    tell: Callable[[str], None],
) -> Experts:
    """Reads and tokenizes the conversations.

    Args:
        config: Of the run.
        batch: The sizes of a step.
        share: See `Experts`.
        quarantine, one_machine, tell: As in `prepare.sets.token_sets`.
    """
    rows = demonstrated_rows(config, config.chord_sft_dataset)
    read, _ = token_sets(rows, "sft", quarantine, one_machine=one_machine, tell=tell)
    each = config.chord_sft_per_device_train_batch_size or config.per_device_train_batch_size
    count = each * batch.completions_per_step // config.per_device_train_batch_size
    return Experts(read, count, share, config.data_seed, config.dataset_shuffle)
