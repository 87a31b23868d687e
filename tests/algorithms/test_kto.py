"""KTO against the paper's value function, case by case, and its step-wide reference point."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import single_weights
from raytune_rl.algorithms.losses.kto import KTOSettings, reference_point
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import F64, make_step, step_result

LENGTHS = (5, 1, 9, 0, 6)
LABELS = (1.0, 0.0, 0.0, 1.0, 1.0)
Z0 = 0.4
CUTS = [[[0], [1], [2], [3], [4]], [[4, 1], [], [2, 0, 3]]]


def step(settings: KTOSettings, **more: Any) -> LossInputs:
    return make_step(LENGTHS, settings, seed=5, label=LABELS, reference_point=[Z0] * 5, **more)


def run(
    given: LossInputs, cut: list[list[int]] | None = None
) -> tuple[float, torch.Tensor, dict[str, float]]:
    weights = single_weights(LENGTHS)
    return step_result("kto", given, weights.weight, weights.row_weight, cut)


def sig(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_value_and_gradient(loss_type: Any) -> None:
    beta, good, bad = 0.7, 1.3, 0.6
    settings = KTOSettings(beta=beta, desirable_weight=good, undesirable_weight=bad, loss_type=loss_type)
    given = step(settings)
    loss, grad, metrics = run(given)
    z0 = Z0 if loss_type == "kto" else 0.0
    gap = (given.logprobs - given.columns["ref_logprobs"]).detach()
    want, slope, rewards = 0.0, [], []
    for row, length in enumerate(LENGTHS):
        h = gap[given.row_of == row].sum().item()
        rewards.append(beta * h)
        v = sig(beta * (h - z0)) if LABELS[row] else sig(beta * (z0 - h))
        weight = good if LABELS[row] else bad
        want += weight * (1 - v) / 5
        d = -weight * beta * v * (1 - v) / 5
        slope += [d if LABELS[row] else -d] * length
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=F64), rtol=1e-11, atol=1e-15)
    assert metrics["rewards/chosen"] == pytest.approx(np.mean([rewards[0], rewards[3], rewards[4]]))
    assert metrics["rewards/rejected"] == pytest.approx(np.mean(rewards[1:3]))
    assert metrics.get("kl") == (Z0 if loss_type == "kto" else None)


@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_into_micro_batches_does_not_matter(cut: list[list[int]]) -> None:
    given = step(KTOSettings(desirable_weight=1.2))
    whole, parts = run(given), run(given, cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)


def test_identical_policies_and_beta_to_zero() -> None:
    """At the reference with z0 = 0 every row is worth 1/2; good ones are pushed up, bad ones down."""
    given = make_step((3, 3), KTOSettings(), label=[1, 0], reference_point=[0, 0])
    given = replace(given, columns={"ref_logprobs": given.logprobs.detach()})
    loss, grad, _ = step_result("kto", given, [0, 0], [0.5, 0.5])
    assert loss == pytest.approx(0.5)
    assert grad[:3].max() < 0 < grad[3:].min()
    assert run(step(KTOSettings(beta=0.0)))[1].abs().sum() == 0


@pytest.mark.parametrize("gap", [1e3, -1e3, 1e6, -1e6])
def test_extremes_are_finite(gap: float) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    values = {"label": torch.tensor([1.0, 0.0]).double(), "reference_point": torch.full((2,), 1e5).double()}
    given = LossInputs(
        logprobs,
        torch.tensor([0, 1]),
        2,
        KTOSettings(),
        {"ref_logprobs": logprobs.detach() - gap},
        row_values=values,
    )
    loss = get_loss("kto")(given).total(None, torch.ones(2).double())
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_reference_point() -> None:
    assert reference_point([0.5, 1.5, -0.5]) == pytest.approx(0.5)
    assert reference_point([-3.0, 1.0]) == 0.0
    assert reference_point([]) == 0.0
    assert reference_point([math.nan, math.inf, 2.0]) == 2.0


def test_what_it_needs() -> None:
    given = step(KTOSettings())
    with pytest.raises(ConfigError, match="label, reference_point"):
        run(replace(given, row_values={}))
    only = {"label": given.row_values["label"]}
    run(replace(given, row_values=only, settings=KTOSettings(loss_type="apo_zero_unpaired")))
    for bad in ({"beta": -1.0}, {"desirable_weight": -1.0}, {"loss_type": "bco"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            KTOSettings(**bad)  # type: ignore[arg-type]
