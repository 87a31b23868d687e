"""What workers work out of a whole optimizer step: the same for any ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.credit.otb import otb_advantages
from raytune_rl.algorithms.losses.sft import SFTSettings
from raytune_rl.data.collate import collate
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.models.load import load_model
from raytune_rl.models.routing import experts_per_token
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import TokenOrder
from tests.families.recipes import make_family
from tests.workers.local_world import LocalWorld

LENGTHS = (7, 3, 12, 5, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = make_family("qwen3_moe", tmp_path_factory.mktemp("moe") / "m", tied=False)
    return load_model(str(path)).model


def batch_of(world: LocalWorld) -> tuple[TrainBatch, list[np.ndarray], list[np.ndarray]]:
    """Five rows of a store, their tokens and masks."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(5, 60, size=n).astype(np.int32) for n in LENGTHS]
    masks = [np.arange(n) > n // 2 for n in LENGTHS]
    ref = world.put(tokens=Ragged.from_rows(tokens, np.int32), loss_mask=Ragged.from_rows(masks, np.bool_))
    rows = [RowPointer(ref, row) for row in range(len(LENGTHS))]
    return TrainBatch(rows, np.array(LENGTHS)), tokens, masks


def policy_of(world: LocalWorld, monkeypatch: pytest.MonkeyPatch) -> PolicyGroup:
    group = PolicyGroup(cast(Any, world))
    monkeypatch.setattr(group, "_scored", world.scored)
    return group


@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 12), (2, 12), (7, 9)])
def test_the_routers_loss_is_that_of_the_whole_step(
    ranks: int, max_tokens: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more ranks than rows, some of which have none."""
    settings = SFTSettings()
    world = LocalWorld(
        monkeypatch, model, "sft", settings, ranks=ranks, max_tokens=max_tokens, router_aux_loss_coef=0.5
    )
    batch, tokens, masks = batch_of(world)
    trained = [int(mask.sum()) for mask in masks]
    grads, metrics = world.gradient(batch.with_scalars(weight=row_weights(trained, "sft")), monkeypatch)
    micro = collate(tokens, masks, layout="padded", pad_token_id=0)
    assert micro.attention_mask is not None
    output = model(micro.input_ids, attention_mask=micro.attention_mask, output_router_logits=True)
    experts = output.router_logits[0].shape[-1]
    aux = load_balancing_loss_func(
        output.router_logits, experts, experts_per_token(model.config), micro.attention_mask
    )
    picked = output.logits.flatten(0, 1)[micro.predict_index].log_softmax(-1)
    nll = -picked.gather(-1, micro.targets[:, None]).mean()
    model.zero_grad()
    (nll + 0.5 * aux).backward()
    assert metrics["router_aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(nll.item(), rel=1e-5), "without the routers' part"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[f"model.{name}"], parameter.grad, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 1000), (2, 12), (7, 9)])
def test_the_first_tokens_of_an_order_are_those_of_the_whole_step(
    ranks: int, max_tokens: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LocalWorld(monkeypatch, model, "sft", SFTSettings(), ranks=ranks, max_tokens=max_tokens)
    policy = policy_of(world, monkeypatch)
    batch, _, masks = batch_of(world)
    advantages, counted = np.array([1.0, -1.0, 0.5, -0.5, 2.0]), np.array([1, 1, 1, 0, 1])
    scored = policy.logprobs(batch)
    logprobs = [world.store[p.ref]["logprobs"][p.row] for p in scored.columns]
    assert [len(row) for row in logprobs] == [int(mask.sum()) for mask in masks]
    np.testing.assert_allclose(scored.sums, [row.sum() for row in logprobs], rtol=1e-6)
    asked = batch.with_columns(start_logprobs=scored.columns).with_scalars(
        advantage=advantages, counted=counted
    )

    def chosen(order: TokenOrder, count: int) -> set[tuple[int, int]]:
        pointers = policy.first_tokens(asked, order, count)
        marks = [world.store[p.ref]["selected"][p.row] for p in pointers]
        assert [len(m) for m in marks] == [len(row) for row in logprobs]
        return {(row, int(t)) for row, m in enumerate(marks) if counted[row] for t in np.flatnonzero(m)}

    covariance = {
        (row, t): (float(lp) + 3.0) * (advantages[row] - 0.1)
        for row, of_row in enumerate(logprobs)
        if counted[row]
        for t, lp in enumerate(of_row)
    }
    largest = sorted(covariance, key=lambda at: -covariance[at])
    for count in (1, 4, len(largest)):
        assert chosen(TokenOrder(-3.0, 0.1), count) == set(largest[:count])
    inside = {at for at, value in covariance.items() if -0.5 < value < 0.5}
    drawn = chosen(TokenOrder(-3.0, 0.1, (-0.5, 0.5), 3, 42), 3)
    assert len(drawn) == min(3, len(inside))
    assert drawn <= inside
    DRAWS.add(frozenset(drawn))
    assert len(DRAWS) == 1, "the same whatever the number of ranks"


DRAWS: set[frozenset[tuple[int, int]]] = set()


@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 1000), (2, 12), (7, 9)])
def test_the_token_baseline_compares_groups_wherever_their_rows_lie(
    ranks: int, max_tokens: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LocalWorld(monkeypatch, model, "sft", SFTSettings(), ranks=ranks, max_tokens=max_tokens)
    policy = policy_of(world, monkeypatch)
    batch, tokens, masks = batch_of(world)
    rewards, groups = np.array([1.0, 0.0, 0.0, 1.0, np.nan]), [4, 9, 4, 9, 9]
    columns, means = policy.token_baseline(batch, rewards, groups)
    model.eval()
    logprobs, squares = [], []
    with torch.no_grad():
        for row, mask in zip(tokens, masks, strict=True):
            log_p = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
            at = np.flatnonzero(mask)
            logprobs.append(log_p[at - 1, row[at].astype(np.int64)].numpy())
            squares.append((2 * log_p[at - 1]).exp().sum(-1).numpy())
    for group in (4, 9):
        members = [row for row, g in enumerate(groups) if g == group]
        want = otb_advantages(
            rewards[members], [logprobs[row] for row in members], [squares[row] for row in members]
        )
        for row, expected in zip(members, want, strict=True):
            found = world.store[columns[row].ref]["advantages"][columns[row].row]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert means[row] == pytest.approx(expected.mean(), abs=1e-5)
