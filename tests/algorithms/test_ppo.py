"""PPO's rewards, advantages, whitening and critic loss against their definitions, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.gae import gae, missing_eos, token_rewards
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.ppo import ValueSettings, clipped_value_loss
from raytune_rl.algorithms.moments import Moments, merge_moments, whiten
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import F64, rows_of, step_result

LENGTHS = (5, 1, 0, 7, 3)
ROW_OF = rows_of(LENGTHS)
N = sum(LENGTHS)
GENERATOR = torch.Generator().manual_seed(2)


def noise(n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=GENERATOR, dtype=F64)


def split(flat: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in flat.split(LENGTHS)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float) -> None:
    rewards, values = noise(), noise()
    got = gae(rewards, values, ROW_OF, 5, gamma=gamma, lam=lam)
    want = []
    for r, v in zip(split(rewards), split(values), strict=True):
        after = [*v[1:], 0.0]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))] if r else []
        want += [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
    torch.testing.assert_close(got.advantages, torch.tensor(want, dtype=F64), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.returns, got.advantages + values)


def test_gae_limits() -> None:
    rewards, values = noise(), noise()
    whole = gae(rewards, values, ROW_OF, 5, gamma=1.0, lam=1.0)
    to_go = [sum(row[t:]) for row in split(rewards) for t in range(len(row))]
    torch.testing.assert_close(whole.returns, torch.tensor(to_go, dtype=F64))
    none = gae(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long), 2)
    assert none.advantages.shape == (0,)
    alone = gae(rewards, values, ROW_OF, 5)
    first = gae(rewards[:5], values[:5], ROW_OF[:5], 1)
    torch.testing.assert_close(alone.advantages[:5], first.advantages, rtol=0, atol=0)


def test_token_rewards() -> None:
    scores, old, ref = noise(5), noise(), noise()
    got = split(token_rewards(scores, old, ref, ROW_OF, 5, kl_coef=0.3))
    for row, (o, r) in enumerate(zip(split(old), split(ref), strict=True)):
        want = [-0.3 * (a - b) for a, b in zip(o, r, strict=True)]
        if want:
            want[-1] += scores[row].item()
        assert got[row] == pytest.approx(want)


def test_completions_without_an_end_cost() -> None:
    scores, finished = np.array([1.0, 2.0]), np.array([True, False])
    assert missing_eos(scores, finished, 5.0).tolist() == [1.0, -3.0]
    assert missing_eos(scores, finished, None).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_sees_the_whole_step(shift_mean: bool) -> None:
    values = noise() * 3 + 1e6
    parts = [values[:4], values[4:4], values[4:5], values[5:]]
    moments = merge_moments(Moments.of(p) for p in parts)
    assert moments.std == pytest.approx(float(np.std(values.numpy(), ddof=1)), rel=1e-9)
    assert moments.mean == pytest.approx(values.mean().item(), rel=1e-14)
    white = torch.cat([whiten(p, moments, shift_mean=shift_mean) for p in parts])
    mean, std = values.mean(), values.std()
    want = (values - mean) / std + (0.0 if shift_mean else mean)
    torch.testing.assert_close(white, want, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("values", [[], [2.0], [3.0, 3.0, 3.0]])
def test_whitening_without_a_spread_is_finite(values: list[float]) -> None:
    flat = torch.tensor(values, dtype=F64)
    assert torch.isfinite(whiten(flat, Moments.of(flat))).all()
    assert Moments().merge(Moments()) == Moments()


def test_value_loss() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, -0.9, 0.1], dtype=F64, requires_grad=True)
    old = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0], dtype=F64)
    returns = torch.tensor([1.0, 2.0, 0.0, -1.0, 5.0], dtype=F64)
    loss, metrics = clipped_value_loss(values, old, returns, 0.2)
    want, slope, binds = [], [], []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        c = min(max(v, o - 0.2), o + 0.2)
        want.append(max((v - r) ** 2, (c - r) ** 2) / 2)
        binds.append((c - r) ** 2 > (v - r) ** 2)
        slope.append(0.0 if binds[-1] else v - r)
    assert loss.tolist() == pytest.approx(want)
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == pytest.approx(slope)
    assert binds == [False, True, False, True, False]
    assert metrics.result()["val/clipfrac_avg"] == pytest.approx(0.4)


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3], [4]], [[4, 0], [], [3, 2, 1]]])
def test_critic_loss_does_not_depend_on_the_cut(cut: Any) -> None:
    values = noise().requires_grad_()
    given = LossInputs(
        torch.zeros(0, dtype=F64),
        ROW_OF,
        5,
        ValueSettings(0.1),
        {"old_values": values.detach() + 0.3 * noise(), "returns": noise()},
        values=values,
    )
    weight = row_weights(LENGTHS, "dapo")
    whole, parts = step_result("ppo_value", given, weight), step_result("ppo_value", given, weight, cut=cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)
    with pytest.raises(ConfigError, match="a model that gives values"):
        get_loss("ppo_value")(LossInputs(values, ROW_OF, 5, ValueSettings(), given.columns))
    with pytest.raises(ConfigError, match="cliprange_value"):
        ValueSettings(-0.1)


def test_the_policys_loss_is_the_clipped_one_with_an_advantage_a_token() -> None:
    """PPO, eq. 7: mean over tokens of max(-A rho, -A clip(rho, 1 +- e))."""
    logprobs = noise().requires_grad_()
    old, advantages = logprobs.detach() + 0.3 * noise(), noise()
    given = LossInputs(logprobs, ROW_OF, 5, GRPOSettings(beta=0.0), {"old_logprobs": old}, advantages)
    loss, _, _ = step_result("grpo", given, row_weights(LENGTHS, "dapo"))
    want = 0.0
    for at in range(N):
        rho, a = math.exp(logprobs[at].item() - old[at].item()), advantages[at].item()
        want += max(-a * rho, -a * min(max(rho, 0.8), 1.2)) / N
    assert loss == pytest.approx(want, rel=1e-12)
