"""ORPO, CPO, SimPO and the reward model against their papers, with slopes by central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import pair_weights
from raytune_rl.algorithms.losses.cpo import CPOSettings
from raytune_rl.algorithms.losses.orpo import ORPOSettings, log_odds
from raytune_rl.algorithms.losses.rm import RMSettings
from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import F64, make_pairs, rows_of, step_result

LENGTHS = (5, 3, 1, 1, 2, 7)
PAIRS = 3
CUTS = [[[0, 1], [2, 3], [4, 5]], [[4, 5, 0, 1], [], [2, 3]]]


def ls(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def run(
    name: str, given: LossInputs, cut: list[list[int]] | None = None, likelihood: Any = "tokens"
) -> tuple[float, torch.Tensor, dict[str, float]]:
    weights = pair_weights(np.bincount(given.row_of, minlength=given.n_rows), likelihood)
    return step_result(name, given, weights.weight, weights.row_weight, cut)


def by_hand(
    given: LossInputs, pair_loss: Callable[[list[float], list[float]], float]
) -> tuple[float, torch.Tensor]:
    """Mean over pairs of a function of the two rows' token log-probs, and its gradient, token by token."""
    rows = [given.logprobs[given.row_of == row].tolist() for row in range(given.n_rows)]
    total, slope = 0.0, []
    for k in range(PAIRS):
        sides = rows[2 * k], rows[2 * k + 1]
        total += pair_loss(*sides) / PAIRS
        for side in (0, 1):
            for at in range(len(sides[side])):
                ends = []
                for h in (1e-5, -1e-5):
                    moved = [list(s) for s in sides]
                    moved[side][at] += h
                    ends.append(pair_loss(moved[0], moved[1]))
                slope.append((ends[0] - ends[1]) / 2e-5 / PAIRS)
    return total, torch.tensor(slope, dtype=F64)


def mean(row: list[float]) -> float:
    return sum(row) / len(row)


@pytest.mark.parametrize("likelihood", ["tokens", "rows"])
def test_orpo(likelihood: str) -> None:
    """L = NLL(chosen) - lambda log sigmoid(log odds ratio), odds of the mean token probability."""
    lam = 0.25

    def odds(row: list[float]) -> float:
        p = math.exp(mean(row))
        return p / (1 - p)

    given = make_pairs(LENGTHS, ORPOSettings(beta=lam), seed=6)
    loss, grad, metrics = run("orpo", given, likelihood=likelihood)
    chosen = [row for row in range(6) if row % 2 == 0]
    tokens = sum(LENGTHS[row] for row in chosen)

    def pair(w: list[float], lost: list[float]) -> float:
        nll = -sum(w) * PAIRS / tokens if likelihood == "tokens" else -mean(w)
        return nll - lam * ls(math.log(odds(w)) - math.log(odds(lost)))

    want, slope = by_hand(given, pair)
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)
    picked = given.row_of % 2 == 0
    assert metrics["nll_loss"] == pytest.approx(-given.logprobs[picked].mean().item())


@pytest.mark.parametrize("logp", [-1e-3, -0.1, -math.log(2), -1.0, -5.0, -40.0])
def test_log_odds_are_accurate(logp: float) -> None:
    value = torch.tensor([logp], dtype=F64, requires_grad=True)
    got = log_odds(value)
    assert got.item() == pytest.approx(logp - math.log(-math.expm1(logp)), rel=1e-12)
    (slope,) = torch.autograd.grad(got.sum(), value)
    assert slope.item() == pytest.approx(1 / -math.expm1(logp), rel=1e-10)


@pytest.mark.parametrize("logp", [0.0, -0.0, -1e-12, -800.0, -1e6])
def test_log_odds_at_the_ends_are_finite(logp: float) -> None:
    value = torch.tensor([logp], dtype=F64, requires_grad=True)
    got = log_odds(value)
    (slope,) = torch.autograd.grad(got.sum(), value)
    assert torch.isfinite(got).all()
    assert torch.isfinite(slope).all()


CPO_CASES = [
    CPOSettings(beta=0.3, cpo_alpha=0.5),
    CPOSettings(beta=0.3, cpo_alpha=0.0, label_smoothing=0.2),
    CPOSettings(loss_type="hinge", beta=0.2),
    CPOSettings(loss_type="ipo", beta=0.4, cpo_alpha=0.3),
    CPOSettings(loss_type="simpo", beta=2.0, simpo_gamma=1.3, cpo_alpha=0.0),
    CPOSettings(loss_type="simpo", beta=2.0),
]


@pytest.mark.parametrize("settings", CPO_CASES, ids=str)
def test_cpo_and_simpo(settings: CPOSettings) -> None:
    given = make_pairs(LENGTHS, settings, seed=7)
    loss, grad, metrics = run("cpo", given)
    tokens = sum(LENGTHS[0::2])
    beta, e = settings.beta, settings.label_smoothing

    def pair(w: list[float], lost: list[float]) -> float:
        total, average = sum(w) - sum(lost), mean(w) - mean(lost)
        if settings.loss_type == "sigmoid":
            z = beta * total
            preference = -(1 - e) * ls(z) - e * ls(-z)
        elif settings.loss_type == "hinge":
            preference = max(0.0, 1 - beta * total)
        elif settings.loss_type == "ipo":
            preference = (average - 1 / (2 * beta)) ** 2
        else:
            preference = -ls(beta * average - settings.simpo_gamma)
        return preference - settings.cpo_alpha * sum(w) * PAIRS / tokens

    want, slope = by_hand(given, pair)
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-9)
    assert ("nll_loss" in metrics) == (settings.cpo_alpha > 0)
    assert (metrics["rewards/margins"] > 0) == (metrics["rewards/chosen"] > metrics["rewards/rejected"])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("name", "settings"), [("orpo", ORPOSettings()), *(("cpo", s) for s in CPO_CASES)])
def test_the_cut_into_micro_batches_does_not_matter(name: str, settings: Any, cut: list[list[int]]) -> None:
    given = make_pairs(LENGTHS, settings, seed=8)
    whole, parts = run(name, given), run(name, given, cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)


@pytest.mark.parametrize(("name", "settings"), [("orpo", ORPOSettings()), *(("cpo", s) for s in CPO_CASES)])
@pytest.mark.parametrize("values", [[0.0, 0.0], [-1e5, -1e-9], [-1e-9, -1e5], [-0.0, -1e5]])
def test_extremes_and_empty_rows_stay_finite(name: str, settings: Any, values: list[float]) -> None:
    logprobs = torch.tensor(values, requires_grad=True)
    for row_of, n_rows in (([0, 1], 2), ([0, 0], 2), ([1, 1], 2)):
        given = LossInputs(
            logprobs,
            torch.tensor(row_of),
            n_rows,
            settings,
            row_values={PAIR: torch.from_numpy(pair_numbers(1))},
        )
        loss = get_loss(name)(given).total(torch.ones(2), torch.ones(2))
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("name", "settings"), [("orpo", ORPOSettings(0.0)), ("cpo", CPOSettings(beta=0.0))])
def test_beta_to_zero_leaves_the_likelihood(name: str, settings: Any) -> None:
    given = make_pairs(LENGTHS, settings, seed=8)
    _, grad, _ = run(name, given)
    chosen = given.row_of % 2 == 0
    torch.testing.assert_close(grad, -chosen.double() / chosen.sum())


# -- reward model


def scored(settings: RMSettings, margins: list[float] | None = None) -> LossInputs:
    scores = torch.tensor([1.2, 0.3, -0.5, 0.9, 2.0, 2.0], dtype=F64, requires_grad=True)
    values = {PAIR: torch.from_numpy(pair_numbers(3))}
    if margins is not None:
        values["margin"] = torch.tensor(margins, dtype=F64).repeat_interleave(2)
    empty = torch.zeros(0, dtype=F64)
    return LossInputs(empty, rows_of(()), 6, settings, row_values=values, scores=scores)


@pytest.mark.parametrize("cut", [None, *CUTS])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("center", [None, 0.01])
def test_reward_model(margins: list[float] | None, center: float | None, cut: list[list[int]] | None) -> None:
    given = scored(RMSettings(center), margins)
    assert given.scores is not None
    loss, grad, metrics = step_result("rm", given, np.zeros(6), pair_weights([1] * 6).row_weight, cut)
    want, slope = 0.0, []
    for k in range(3):
        w, lost = given.scores[2 * k].item(), given.scores[2 * k + 1].item()
        z = w - lost - (margins[k] if margins else 0.0)
        c = center or 0.0
        want += (-ls(z) + c * (w + lost) ** 2) / 3
        push, pull = -1 / (1 + math.exp(z)), 2 * c * (w + lost)
        slope += [(push + pull) / 3, (-push + pull) / 3]
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=F64), rtol=1e-11, atol=1e-14)
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3), "a draw is not a win"
    assert metrics["rewards/max"] == 2.0
    assert metrics["rewards/min"] == -0.5


def test_reward_model_needs_scores_and_stays_finite() -> None:
    given = scored(RMSettings())
    with pytest.raises(ConfigError, match="a model that gives scores"):
        get_loss("rm")(replace(given, scores=None))
    far = torch.tensor([1e6, -1e6, -1e6, 1e6, 0, 0], requires_grad=True)
    loss = get_loss("rm")(replace(given, scores=far)).total(None, torch.ones(6))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, far)[0]).all()


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        (CPOSettings, {"loss_type": "dpo"}),
        (CPOSettings, {"beta": -1.0}),
        (CPOSettings, {"cpo_alpha": -1.0}),
        (CPOSettings, {"label_smoothing": 0.5}),
        (ORPOSettings, {"beta": -1.0}),
        (RMSettings, {"center_rewards_coefficient": -1.0}),
    ],
)
def test_impossible_settings(settings: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        settings(**bad)
    with pytest.raises(ConfigError, match="does nothing"):
        CPOSettings(loss_type="hinge", label_smoothing=0.1)
