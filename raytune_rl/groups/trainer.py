"""The policy as the pipelines see it: a world that trains, and what only a policy does: it scores and
publishes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms import entropy
from raytune_rl.groups.delta_bases import DeltaBases
from raytune_rl.groups.logprobs import score_rows
from raytune_rl.groups.world import Share, TrainerWorld
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import RowLogprobs, TokenOrder, TrainerFacts
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.wait import acknowledge, fetch_all
from raytune_rl.runtime.weights import collect_index


class PolicyGroup:
    """The policy's ranks.

    Args:
        world: Them as one.
        weight_delta: Whether a version may be published as its difference to an older one.
    """

    def __init__(self, world: TrainerWorld, weight_delta: bool = False) -> None:
        self.world = world
        self._bases = DeltaBases() if weight_delta else None
        self._adapter_config: str | None = None

    def ready(self) -> TrainerFacts:
        """Waits until every rank has loaded; returns what rank 0 tells."""
        return self.world.ready()

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of every row under the present weights."""
        return self._scored(batch, "logprobs")

    def base_logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """The same under the base model that an adapter was put on."""
        return self._scored(batch, "base_logprobs")

    def entropies(self, batch: TrainBatch) -> list[RowPointer]:
        """Where the log-probs of every row lie, and the entropy at each of its loss tokens."""
        return self._scored(batch, "entropies").columns

    def _scored(self, batch: TrainBatch, method: str) -> RowLogprobs:
        world = self.world
        return world.run(
            f"log-probs of {len(batch)} rows",
            lambda: score_rows(
                world.group, batch, world.max_tokens, world.settled, collective=True, method=method
            ),
        )

    def entropy_threshold(self, batch: TrainBatch, tokens: Sequence[int], share: float) -> float:
        """The entropy that a token of these rows must have to be among the top `share` of them, nats.

        Args:
            batch: The rows that count, with the column "entropy" as `entropies` gave it.
            tokens: Loss tokens of each.
            share: Of the tokens, in (0, 1].

        Returns:
            Exactly one of the entropies; minus infinity where there are no tokens.
        """
        if not sum(tokens):
            return -math.inf
        shares = self.world.shares(batch.keep({"entropy"}), np.asarray(tokens, dtype=np.int64))

        def counted(bucket: int | None) -> NDArray[np.int64]:
            return entropy.merge(self.world.ask("count_entropies", shares, bucket, what="counting entropies"))

        high = entropy.find(counted(None), entropy.threshold_rank(sum(tokens), share))
        return entropy.value(high.index, entropy.find(counted(high.index), high.rest).index)

    def token_baseline(
        self, batch: TrainBatch, rewards: NDArray[np.float64], groups: Sequence[int]
    ) -> tuple[list[RowPointer], NDArray[np.float64]]:
        """Advantages against the optimal token baseline (`algorithms.credit.otb`), under the present weights.

        Args:
            batch: The rows; a group may lie anywhere in it.
            rewards: Of each, float64 `[n]`.
            groups: Of each.

        Returns:
            Where each row's lie, and the mean of each row, float64 `[n]`.
        """
        scored = self._scored(batch, "squares").columns
        given = batch.keep(()).with_columns(squares=scored).with_scalars(reward=rewards, group=groups)
        ids, number = np.unique(np.asarray(groups), return_inverse=True)
        ranks = len(self.world)
        parts = [np.flatnonzero(number % ranks == rank).tolist() for rank in range(min(ranks, len(ids)))]
        shares = [Share(given.part(rows).message(), rows) for rows in parts]
        columns, answers = self.world.columns("token_baseline", shares)
        means = np.zeros(len(batch))
        for share, of_share in zip(shares, answers, strict=True):
            means[share.rows] = of_share
        return columns, means

    def first_tokens(self, batch: TrainBatch, order: TokenOrder, count: int) -> list[RowPointer]:
        """Which tokens are the first in an order.

        Args:
            batch: Rows with the column "start_logprobs" as `logprobs` gave it and the scalar "advantage";
                those with the scalar "counted" 0 have no part.
            order: Of the tokens.
            count: How many; fewer where the order has fewer, more where the last ones are equal.

        Returns:
            Where each row's 1 and 0 lie.
        """
        numbered = batch.keep({"start_logprobs"}).with_scalars(row_number=np.arange(len(batch)))
        kept = np.flatnonzero(batch.scalars["counted"]).tolist()
        of_step = self.world.shares(numbered.part(kept))

        def counted(bucket: int | None) -> NDArray[np.int64]:
            return entropy.merge(
                self.world.ask("count_tokens", of_step, order, bucket, what="counting tokens")
            )

        coarse, last = counted(None), -math.inf
        if (total := int(coarse.sum())) > 0:
            high = entropy.find(coarse, min(count, total) - 1)
            last = entropy.value(high.index, entropy.find(counted(high.index), high.rest).index)
        return self.world.columns("select_tokens", self.world.shares(numbered), order, last)[0]

    def row_kl(self, batch: TrainBatch, estimator: str) -> NDArray[np.float64]:
        """The KL to the reference of each row, summed over its tokens, float64 `[n]`, nats.

        Args:
            batch: Rows with the columns "old_logprobs" and "ref_logprobs", of policy and reference.
            estimator: "k1", "k2" or "k3" (`algorithms.kl`).
        """
        shares = self.world.shares(batch.keep({"old_logprobs", "ref_logprobs"}))
        answers = self.world.ask("row_kl", shares, estimator, what="the KL of each completion")
        sums = np.zeros(len(batch))
        for share, share_kl in zip(shares, answers, strict=True):
            sums[share.rows] = share_kl
        return sums

    def publish(self, version: int) -> Manifest:
        """The present weights as objects in the store: one call a rank, one object a bucket.

        Ranks without a bucket take part too: they may hold a share of the others'.
        """
        world, adapter = self.world, self.world.spec.publish_mode == "adapter"
        refs, sizes = world.run(f"publishing weights {version}", lambda: self._buckets(version))
        if adapter and self._adapter_config is None:
            self._adapter_config = world.run(
                "reading the adapter's configuration",
                lambda: fetch_all([world.group.submit(0, "adapter_config")])[0],
            )
        world.keep()
        index = collect_index(world.weight_index)
        return Manifest(
            version,
            "adapter" if adapter else "full",
            tuple(refs),
            index,
            self._adapter_config,
            () if self._bases is None else self._bases.published(refs, index, sizes),
        )

    def _buckets(self, version: int) -> tuple[list[Any], list[int | None]]:
        """References to all buckets, and the bytes of those that are differences."""
        counts = [len(buckets) for buckets in self.world.weight_index]
        offered = [] if self._bases is None else self._bases.offered(sum(counts))
        pending = []
        for rank, count in enumerate(counts):
            own, offered = offered[:count], offered[count:]
            what = f"publishing weights {version}"
            pending.append(self.world.group.submit(rank, "publish", own, what=what, returns=1 + count))
        told = zip(acknowledge(pending), counts, strict=True)
        sizes = [size for of_rank, count in told if count for size in of_rank]
        return [ref for p in pending if isinstance(p.ref, list) for ref in p.ref[1:]], sizes
