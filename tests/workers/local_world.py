"""Ranks of one process: real trainer workers over a real tiny model, without Ray, DeepSpeed or processes.

What ranks add up between them is added up here; what would lie in the object store lies in a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.metrics import MetricSums, merge_all
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.data.microbatch import plan_micro_batches
from raytune_rl.data.read_rows import ReadRows
from raytune_rl.groups.world import Share, rank_share
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.rows import RowBatch, RowPointer, TrainBatch
from raytune_rl.protocol.train import RowLogprobs, ScoreSettings
from raytune_rl.workers import row_stats, scoring
from raytune_rl.workers.micro_steps import MicroSteps
from raytune_rl.workers.trainer import TrainerWorker


class PlainEngine:
    """What a worker asks of DeepSpeed's engine."""

    def __init__(self, scorer: TokenScorer) -> None:
        self.module = scorer

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Nothing to do: gradients add up by themselves."""

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        """Counts a micro-batch."""


class LocalWorld:
    """See `groups.world.TrainerWorld`, as far as it is asked here."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: Any,
        loss: str,
        settings: Any,
        *,
        ranks: int = 1,
        max_tokens: int = 1000,
        layout: str = "packed",
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        self.store: dict[str, Columns] = {}
        self.layout, self.max_tokens, self.ranks = layout, max_tokens, ranks
        monkeypatch.setattr(scoring, "read_rows", self._read)
        monkeypatch.setattr(row_stats, "read_rows", self._read)
        scorer = TokenScorer(model)
        spec: Any = SimpleNamespace(
            seed=0,
            score=ScoreSettings(1.0, 10.0, ()),
            model=SimpleNamespace(layout=layout),
            with_entropy=False,
            router_aux_loss_coef=router_aux_loss_coef,
        )
        self.workers = [TrainerWorker(spec, rank, ranks) for rank in range(ranks)]
        for worker in self.workers:
            engine = PlainEngine(scorer)
            micro = MicroSteps(engine, get_loss(loss), settings, spec, None)
            vars(worker).update(_engine=engine, _micro=micro, _media=None)
        self.scorer = scorer

    def _read(self, batch: RowBatch, timeout_s: float) -> ReadRows:
        return ReadRows(batch, [self.store[ref] for ref in batch.refs])

    def __len__(self) -> int:
        return self.ranks

    def put(self, **columns: Any) -> str:
        """Puts an object into the store."""
        name = f"object {len(self.store)}"
        self.store[name] = columns
        return name

    def shares(self, batch: TrainBatch, lengths: Any = None) -> list[Share]:
        schedule = plan_micro_batches(
            batch.lengths.tolist(),
            world_size=self.ranks,
            max_tokens=self.max_tokens,
            layout=self.layout,  # type: ignore[arg-type]
        )
        return [rank_share(schedule, rank, batch) for rank in range(self.ranks)]

    def ask(self, method: str, shares: Sequence[Share], *args: Any, what: str | None = None) -> list[Any]:
        return [getattr(w, method)(s.batch, *args) for w, s in zip(self.workers, shares, strict=True)]

    def columns(self, method: str, shares: Sequence[Share], *args: Any) -> tuple[list[RowPointer], list[Any]]:
        pointers, answers = {}, []
        for worker, share in zip(self.workers, shares, strict=False):
            told, made = getattr(worker, method)(share.batch, *args)
            name = self.put(**made)
            pointers |= {row: RowPointer(name, number) for number, row in enumerate(share.rows)}
            answers.append(told)
        return [pointers[row] for row in range(len(pointers))], answers

    def scored(self, batch: TrainBatch, method: str) -> RowLogprobs:
        """In place of `groups.logprobs.score_rows`."""
        plain = TrainBatch(batch.rows, batch.lengths)
        shares = self.shares(plain)
        pointers, answers = self.columns(method, shares)
        sums = np.zeros(len(batch))
        for share, told in zip(shares, answers, strict=True):
            sums[share.rows] = told
        return RowLogprobs(pointers, sums)

    def gradient(
        self, batch: TrainBatch, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The gradient of a step, as DeepSpeed's mean over ranks would have it, and its metrics."""
        shares = self.shares(batch)
        if self.workers[0]._spec.router_aux_loss_coef:
            self._add_up_loads(shares, monkeypatch)
        self.scorer.zero_grad()
        parts: list[MetricSums] = []
        for worker, share in zip(self.workers, shares, strict=True):
            parts.append(worker._backward(share.batch, 0)[0])
        grads = {n: p.grad / self.ranks for n, p in self.scorer.named_parameters() if p.grad is not None}
        return grads, merge_all(parts).result()

    def _add_up_loads(self, shares: Sequence[Share], monkeypatch: pytest.MonkeyPatch) -> None:
        """The collective of the ranks' counts: here each rank counts first, and then all know the sum."""
        own: list[torch.Tensor] = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: own.append(counts.clone()))
        for worker, share in zip(self.workers, shares, strict=True):
            worker._micro.expert_load(self._read(share.batch, 0.0), share.batch)
        whole = torch.stack(own).sum(0)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.copy_(whole))
