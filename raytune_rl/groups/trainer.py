"""The policy as the pipelines see it: one object that trains, scores, publishes and saves, whatever its
number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytune_rl.algorithms import entropy
from raytune_rl.algorithms.metrics import MetricSums, merge_all
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.data.microbatch import Schedule, plan_micro_batches
from raytune_rl.protocol.rows import RowBatch, RowPointer, make_batch
from raytune_rl.protocol.train import PolicyFacts, PolicySpec, RowLogprobs, StepReport, TrainResult
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, acknowledge, fetch, fetch_all, settle
from raytune_rl.runtime.weights import collect_index


class PolicyGroup:
    """N ranks that act as one.

    Args:
        group: The started workers.
        spec: What they were given.
        max_tokens: Token budget of a micro-batch.
        start_timeout_s: Deadline for joining and loading.
    """

    def __init__(self, group: WorkerGroup, spec: PolicySpec, max_tokens: int, start_timeout_s: float) -> None:
        self._group = group
        self._spec = spec
        self._max_tokens = max_tokens
        self._layout = spec.model.layout
        self._together = 2 if get_loss(spec.loss).rows == "pairs" else 1
        self._index: list[tuple[tuple[TensorEntry, ...], ...]] = []
        self._adapter_config: str | None = None
        host, port = fetch(group.submit(0, "open_store", start_timeout_s, timeout_s=start_timeout_s))
        self._joining = [
            group.submit(
                rank,
                "join",
                host,
                port,
                start_timeout_s,
                what="joining and loading the model",
                timeout_s=start_timeout_s,
            )
            for rank in range(len(group))
        ]

    def ready(self) -> PolicyFacts:
        """Waits until every rank has loaded; returns what rank 0 tells."""
        facts: PolicyFacts = fetch_all(self._joining)[0]
        self._layout = facts.layout
        if self._spec.publish_mode is not None:
            self._index = self._group.call("weight_index")
        return facts

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._group)

    def train(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
        step: int,
    ) -> StepReport:
        """One optimizer step.

        Args:
            rows: Where each row of the step lies.
            lengths: Tokens of each row.
            scalars: By name, one number a row; "weight" and "row_weight" carry the global normaliser.
            late: By name, where each row of a column that was computed later lies.
            step: Number of the step, from 0.
        """
        return self.finish_step(self.start_step(rows, lengths, scalars, late, step))

    def start_step(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
        step: int,
    ) -> list[Pending]:
        """Begins an optimizer step, arguments as in `train`, for `finish_step` to wait for."""
        batches = self._batches(rows, lengths, scalars, late)
        return [
            self._group.submit(rank, "train_step", b, step, what=f"training step {step + 1}")
            for rank, b in enumerate(batches)
        ]

    def finish_step(self, running: Sequence[Pending]) -> StepReport:
        """Waits for an optimizer step."""
        results: list[TrainResult] = fetch_all(list(running))
        metrics = merge_all(r.metrics for r in results).result()
        metrics |= {"grad_norm": results[0].grad_norm, "learning_rate": results[0].learning_rate}
        return StepReport(metrics, sum(r.tokens for r in results), max(r.memory_gib for r in results))

    def evaluate(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
    ) -> MetricSums:
        """The loss on rows without training on them; arguments as in `train`."""
        batches = self._batches(rows, lengths, scalars, late)
        return merge_all(self._group.map("evaluate", batches, what="evaluating"))

    def logprobs(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
        *,
        without_adapter: bool = False,
    ) -> RowLogprobs:
        """Log-probs of every row under the present weights, or under the base model that an adapter was put
        on; `late` as in `score_rows`."""
        return score_rows(
            self._group,
            rows,
            lengths,
            self._max_tokens,
            self._layout,
            late=late or {},
            collective=True,
            method="base_logprobs" if without_adapter else "logprobs",
        )

    def entropies(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
    ) -> list[RowPointer]:
        """Where the log-probs of every row lie, and the entropy at each of its loss tokens."""
        return score_rows(
            self._group,
            rows,
            lengths,
            self._max_tokens,
            self._layout,
            late=late or {},
            collective=True,
            method="entropies",
        ).columns

    def entropy_threshold(
        self, rows: Sequence[RowPointer], tokens: Sequence[int], entropies: Sequence[RowPointer], share: float
    ) -> float:
        """The entropy that a token of these rows must have to be among the top `share` of them, nats.

        Args:
            rows: The rows that count.
            tokens: Loss tokens of each.
            entropies: What `entropies` gave for them.
            share: Of the tokens, in (0, 1].

        Returns:
            Exactly one of the entropies; minus infinity where there are no tokens.
        """
        if not sum(tokens):
            return -math.inf
        schedule = self._schedule(tokens)
        batches = [
            rank_batch(schedule, r, rows, {}, {"entropy": entropies})[0] for r in range(self.world_size)
        ]

        def counted(bucket: int | None) -> NDArray[np.int64]:
            return entropy.merge(
                fetch_all(
                    [
                        self._group.submit(rank, "count_entropies", b, bucket, what="counting entropies")
                        for rank, b in enumerate(batches)
                    ]
                )
            )

        found = entropy.find(counted(None), entropy.threshold_rank(sum(tokens), share))
        return entropy.value(found.index, entropy.find(counted(found.index), found.rest).index)

    def row_kl(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        old: Sequence[RowPointer],
        ref: Sequence[RowPointer],
        estimator: str,
    ) -> NDArray[np.float64]:
        """The KL to the reference of each row, summed over its tokens, float64 `[n]`, nats.

        Args:
            rows: Where the rows lie.
            lengths: Tokens of each.
            old, ref: Where the log-probs of policy and reference lie.
            estimator: "k1", "k2" or "k3" (`algorithms.kl`).
        """
        late = {"old_logprobs": old, "ref_logprobs": ref}
        schedule = self._schedule(lengths)
        shares = [rank_batch(schedule, rank, rows, {}, late) for rank in range(self.world_size)]
        pending = [
            self._group.submit(rank, "row_kl", batch, estimator, what="the KL of each completion")
            for rank, (batch, _) in enumerate(shares)
        ]
        sums = np.zeros(len(rows))
        for (_, mine), found in zip(shares, fetch_all(pending), strict=True):
            sums[mine] = found
        return sums

    def publish(self, version: int) -> Manifest:
        """The present weights as objects in the store: one call a rank, one object a bucket.

        Ranks without a bucket take part too: they may hold a share of the others'.
        """
        pending = [
            self._group.submit(
                rank, "publish", what=f"publishing weights {version}", returns=1 + len(buckets)
            )
            for rank, buckets in enumerate(self._index)
        ]
        acknowledge(pending)
        refs = [ref for p in pending if isinstance(p.ref, list) for ref in p.ref[1:]]
        adapter = self._spec.publish_mode == "adapter"
        if adapter and self._adapter_config is None:
            self._adapter_config = fetch(self._group.submit(0, "adapter_config"))
        return Manifest(
            version,
            "adapter" if adapter else "full",
            tuple(refs),
            collect_index(self._index),
            self._adapter_config,
        )

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves the ranks' weights and optimizer state to the CPU."""
        self._group.call("offload", weights, optimizer, what="offloading")

    def reload(self) -> None:
        """Brings them back."""
        self._group.call("reload", what="reloading")

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the model, and the optimizer's state unless only the model is wanted."""
        self._group.call("save_model", str(directory), what="saving the model")
        if not only_model:
            self._group.call("save_optimizer", str(directory / "optimizer"), what="saving the optimizer")

    def load(self, directory: Path) -> None:
        """Restores weights and optimizer state of a checkpoint."""
        self._group.call("load_checkpoint", str(directory / "optimizer"), what="restoring the checkpoint")

    def _batches(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
    ) -> list[RowBatch]:
        schedule = self._schedule(lengths)
        return [rank_batch(schedule, rank, rows, scalars, late)[0] for rank in range(self.world_size)]

    def _schedule(self, lengths: Sequence[int]) -> Schedule:
        return plan_micro_batches(
            lengths,
            world_size=self.world_size,
            max_tokens=self._max_tokens,
            layout=self._layout,  # type: ignore[arg-type]
            together=self._together,
        )


def rank_batch(
    schedule: Schedule,
    rank: int,
    rows: Sequence[RowPointer],
    scalars: Mapping[str, ArrayLike],
    late: Mapping[str, Sequence[RowPointer]],
) -> tuple[RowBatch, list[int]]:
    """The rows of one rank, numbered anew, and their numbers in the whole step."""
    mine = [row for micro in schedule.ranks[rank] for row in micro]
    local = {row: number for number, row in enumerate(mine)}
    batch = make_batch(
        [rows[row] for row in mine],
        {name: [pointers[row] for row in mine] for name, pointers in late.items()},
        {name: np.asarray(values, dtype=np.float64)[mine] for name, values in scalars.items()},
        [tuple(local[row] for row in micro) for micro in schedule.ranks[rank]],
    )
    return batch, mine


def score_rows(
    group: WorkerGroup,
    rows: Sequence[RowPointer],
    lengths: Sequence[int],
    max_tokens: int,
    layout: str,
    *,
    late: Mapping[str, Sequence[RowPointer]] | None = None,
    collective: bool = False,
    method: str = "logprobs",
) -> RowLogprobs:
    """Log-probs of rows by any group that can score, the work balanced by tokens.

    Args:
        group: Policy or reference.
        rows: Where the rows lie.
        lengths: Tokens of each.
        max_tokens: Token budget of a micro-batch.
        layout: "padded" or "packed".
        late: By name, where each row of a column that lies in another object is: "images", of online RL.
        collective: Every worker must take part even without rows (a sharded model).
        method: What the workers call it.
    """
    schedule = plan_micro_batches(lengths, world_size=len(group), max_tokens=max_tokens, layout=layout)  # type: ignore[arg-type]
    pending: list[Pending] = []
    shares: list[list[int]] = []
    for rank in range(len(group)):
        batch, mine = rank_batch(schedule, rank, rows, {}, late or {})
        if not mine and not collective:
            continue
        what = f"log-probs of {len(mine)} rows"
        pending.append(group.submit(rank, method, batch, what=what, returns=2))
        shares.append(mine)
    found: dict[int, RowPointer] = {}
    sums = np.empty(len(rows))
    for mine, done, answered in zip(shares, *settle(pending), strict=True):
        sums[mine] = answered
        found |= {row: RowPointer(done.ref[1], number) for number, row in enumerate(mine)}
    return RowLogprobs([found[row] for row in range(len(rows))], sums)
