"""A frozen model and a critic give rows that share their prompts what they give rows that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.registry import get_loss
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.groups.world import rank_share
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Sharing
from raytune_rl.protocol.rows import Prefixes, RowBatch, RowPointer, TrainBatch
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers import isolation, scoring
from raytune_rl.workers.frozen import FrozenModel
from raytune_rl.workers.micro_steps import MicroSteps

SETTINGS = ScoreSettings(0.8, 10.0)
PPO_COLUMNS = {"old_logprobs": -5.5, "advantages": 0.0, "old_values": 0.0, "returns": 0.5}
"""What PPO knows of every token, and its mean."""


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    path = make_tiny_model(tmp_path / "model", hidden=64, layers=2)
    return ModelSpec(str(path), "float32", None, "padded", sharing="auto")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> TrainBatch:
    """Two prompts with four answers each, one of them alone in its group, without an object store."""
    draw = np.random.default_rng(3)
    prompts = [draw.integers(5, 200, length) for length in (30, 12)]
    tokens = [np.append(prompts[row // 4], draw.integers(5, 200, 3 + row % 5)) for row in range(8)]
    masks = [np.arange(len(row)) >= len(prompts[n // 4]) for n, row in enumerate(tokens)]
    columns = {"tokens": Ragged.from_rows(tokens, np.int32), "loss_mask": Ragged.from_rows(masks, np.bool_)}
    for name, mean in PPO_COLUMNS.items():
        of_rows = [draw.normal(mean, 1, mask.sum()) for mask in masks]
        columns[name] = Ragged.from_rows(of_rows, np.float32)
    monkeypatch.setattr(scoring.ray, "get", lambda refs, timeout: [columns for _ in refs])
    prefixes = Prefixes(np.array([0, 0, 0, 0, 1, 1, 1, 7]), np.repeat([30, 12], 4))
    return TrainBatch(
        [RowPointer("store", row) for row in range(8)], columns["tokens"].lengths, prefixes=prefixes
    )


def message(rows: TrainBatch, sharing: Sharing) -> RowBatch:
    """All of one rank, in several micro-batches."""
    plan = plan_step(rows.lengths, rows.prefixes, Budget(1, 45, "padded", sharing))
    share = rank_share(plan, 0, rows)
    assert plan.n_micro_batches > 1
    assert (share.batch.prefixes is not None) == (sharing != "false")
    assert sorted(share.rows) == list(range(len(rows)))
    micro_batches = [[share.rows[row] for row in micro] for micro in share.batch.micro_batches]
    return rows.message(micro_batches, shares=plan.shares)


def test_log_probs_of_a_frozen_model(spec: ModelSpec, rows: TrainBatch) -> None:
    model = FrozenModel(spec, SETTINGS)
    assert model.settled.sharing == "auto"
    apart, shared = (model.logprobs(message(rows, sharing)) for sharing in ("false", "true"))
    np.testing.assert_allclose(shared[0], apart[0], rtol=0, atol=1e-4)
    for row in range(len(rows)):
        np.testing.assert_allclose(shared[1]["logprobs"][row], apart[1]["logprobs"][row], rtol=0, atol=2e-5)
    tops: list[Any] = [
        {row: (ids, probs) for row, ids, probs in model.likeliest(message(rows, sharing), 4)}
        for sharing in ("false", "true")
    ]
    for row in range(len(rows)):
        np.testing.assert_array_equal(tops[0][row][0], tops[1][row][0])


def test_values_of_a_critic(spec: ModelSpec, rows: TrainBatch) -> None:
    loaded = scoring.load(spec, "values")
    loaded.model.score.weight.data.normal_()  # type: ignore[union-attr, operator]
    scorer = scoring.scorer_of(loaded.model, "values").eval()
    assert isolation.settle_rows(scorer, spec, None).sharing == "auto"
    apart, shared = (
        scoring.values(scorer, message(rows, sharing), spec, SETTINGS)[1]["values"]
        for sharing in ("false", "true")
    )
    for row in range(len(rows)):
        np.testing.assert_allclose(shared[row], apart[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("forward", "loss"), [("logprobs", "ppo"), ("values", "ppo_value")])
def test_ppo_and_its_critic_have_the_same_loss_and_gradient(
    forward: Any, loss: str, spec: ModelSpec, rows: TrainBatch
) -> None:
    """With an advantage and a return of its own at every token, and values far enough from the old ones that
    some are clipped.
    """
    loaded = scoring.load(spec, forward)
    if forward == "values":
        loaded.model.score.weight.data.normal_()  # type: ignore[union-attr, operator]
    scorer = scoring.scorer_of(loaded.model, forward).eval()
    assert isolation.settle_rows(scorer, spec, None).sharing == "auto"
    trainer: Any = SimpleNamespace(model=spec, score=SETTINGS, with_entropy=False)
    known = get_loss(loss)
    settings = known.settings_type(beta=0.0) if forward == "logprobs" else known.settings_type()
    steps = MicroSteps(scorer, known, settings, trainer, None)

    def step(sharing: Sharing) -> tuple[float, torch.Tensor]:
        scorer.zero_grad()
        batch = message(rows.with_columns(**dict.fromkeys(PPO_COLUMNS, rows.rows)), sharing)
        batch = replace(batch, scalars={"weight": np.full(len(rows), 1 / 39)})
        read = scoring.read_rows(batch, 10.0)
        total = 0.0
        for members in batch.micro_batches:
            of_micro, _, _ = steps.loss_of(read, batch, members)
            of_micro.backward()
            total += of_micro.item()
        return total, torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])

    (apart, whole), (shared, of_shared) = step("false"), step("true")
    assert abs(apart) > 1e-2
    assert shared == pytest.approx(apart, rel=1e-5)
    assert float((of_shared - whole).abs().max() / whole.abs().max()) < 1e-5


def test_a_model_whose_sharing_is_off_is_left_as_it_is(spec: ModelSpec) -> None:
    off = FrozenModel(ModelSpec(spec.path, "float32", None, "padded"), SETTINGS)
    assert off.settled.sharing == "false"
    assert off.scorer.model.config._attn_implementation == "sdpa"
