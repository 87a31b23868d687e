"""REAL, Clip-Cov and KL-Cov: losses that must know their whole optimizer step, against formulas written out
here; and that no cut of the step, into ranks or micro-batches, shows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.covariance import step_means, token_keys
from raytune_rl.algorithms.losses.clip_cov import SELECTED, ClipCovSettings, KLCovSettings
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.real import REALSettings, group_slopes
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from raytune_rl.protocol.train import TokenOrder
from tests.algorithms.step import F64, make_step, step_result
from tests.algorithms.whole_step import prepared

LENGTHS = (5, 1, 9, 0, 6, 2, 4, 3)
ADVANTAGES = (1.3, -0.7, -1.1, 2.0, 0.0, -2.0, 0.4, 0.9)
GROUPS = (0, 0, 0, 0, 7, 7, 7, 4)
CUTS = [[[0], [1], [2], [3], [4], [5], [6], [7]], [[4, 0], [2, 3, 1, 5], [], [7, 6]]]
RANKS = [[4, 0], [2, 3, 1, 5], [], [7, 6]]
SETTINGS: dict[str, Any] = {
    "real": REALSettings(beta=0.1),
    "clip_cov": ClipCovSettings(beta=0.1, clip_cov_ratio=0.2, clip_cov_low=-0.2, clip_cov_high=1.0),
    "kl_cov": KLCovSettings(beta=0.1, kl_cov_ratio=0.2, kl_cov_coef=0.7),
}


def step(settings: Any, **more: Any) -> LossInputs:
    return make_step(LENGTHS, settings, advantages=ADVANTAGES, **more)


def means(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token and row weights as the pipeline has them."""
    return row_weights(LENGTHS, name), (np.array(LENGTHS) > 0) / len(LENGTHS)


def per_row(given: LossInputs, column: torch.Tensor) -> list[list[float]]:
    return [column[given.row_of == row].tolist() for row in range(given.n_rows)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_no_cut_of_a_step_shows(name: str, cut: list[list[int]]) -> None:
    given = step(SETTINGS[name])
    whole = step_result(name, prepared(name, given, GROUPS), *means(name))
    parts = step_result(name, prepared(name, given, GROUPS, RANKS), *means(name), cut=cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)
    assert whole[1].abs().sum() > 0


# -- REAL


def real_by_hand(logprobs: list[list[float]], old: list[list[float]], tau: float) -> float:
    """Mean over groups of both kinds of log(1 + sum wrong e^(s / tau)) + log(1 + sum right e^(-s / tau))."""
    losses = []
    for group in sorted(set(GROUPS)):
        right, wrong = 0.0, 0.0
        for lps, olds, a, g in zip(logprobs, old, ADVANTAGES, GROUPS, strict=True):
            if g != group or not lps:
                continue
            s = sum(p - o for p, o in zip(lps, olds, strict=True)) / len(lps)
            right += math.exp(-s / tau) if a > 0 else 0.0
            wrong += math.exp(s / tau) if a < 0 else 0.0
        if right and wrong:
            losses.append(math.log(1 + wrong) + math.log(1 + right))
    assert len(losses) == 2
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_real_is_the_papers_loss_with_its_gradient(tau: float) -> None:
    given = step(REALSettings(beta=0.0, real_tau=tau))
    loss, grad, metrics = step_result("real", prepared("real", given, GROUPS), *means("real"))
    old, now = (per_row(given, c) for c in (given.columns["old_logprobs"], given.logprobs.detach()))
    want = real_by_hand(now, old, tau)
    assert loss == pytest.approx(want, rel=1e-12)
    slopes = per_row(given, grad)
    for row, lps in enumerate(now):
        for t in range(len(lps)):
            shifted = [list(other) for other in now]
            shifted[row][t] += 1e-6
            slope = (real_by_hand(shifted, old, tau) - want) / 1e-6
            assert slopes[row][t] == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert metrics["real/labelled"] == pytest.approx(5 / 8), "the equal one, the empty one, the lone group"


def test_real_where_nothing_has_moved_pushes_each_side_by_its_share() -> None:
    """s = 0: the slope of a right one is -1 / (tau (1 + number of right ones)), of the group's share."""
    given = step(REALSettings(beta=0.0))
    given = replace(given, columns={})
    _, grad, _ = step_result("real", prepared("real", given, GROUPS), *means("real"))
    slopes = per_row(given, grad)
    assert slopes[0] == pytest.approx([-1 / (0.5 * 2) / 2 / 5] * 5), "one right, two groups, five tokens"
    assert slopes[2] == pytest.approx([1 / (0.5 * 3) / 2 / 9] * 9), "two wrong"
    assert slopes[4] == [0.0] * 6
    assert slopes[7] == [0.0] * 3


def test_real_far_out_is_finite_and_bounded() -> None:
    right = np.array([True, False, False])
    for scores in ([-1e6, 1e6, 3.0], [1e6, -1e6, -1e6], [0.0, 0.0, 0.0]):
        loss, slopes = group_slopes(np.array(scores), right, 0.5)
        assert math.isfinite(loss)
        assert np.abs(slopes).sum() <= 2 / 0.5
    loss, slopes = group_slopes(np.array([1e6, -1e6, -1e6]), right, 0.5)
    assert loss == pytest.approx(0.0, abs=1e-12), "told apart: nothing to learn"
    assert not slopes.any()


def test_real_adds_the_kl_and_refuses_what_acts_on_tokens() -> None:
    given = step(REALSettings(beta=0.3))
    with_kl = step_result("real", prepared("real", given, GROUPS), *means("real"))
    plain = step_result("real", prepared("real", step(REALSettings(beta=0.0)), GROUPS), *means("real"))
    still = replace(step(GRPOSettings(beta=0.3)), advantages=torch.zeros(sum(LENGTHS), dtype=F64))
    kl = step_result("grpo", still, row_weights(LENGTHS, "grpo"))
    assert with_kl[0] == pytest.approx(plain[0] + kl[0], rel=1e-12)
    torch.testing.assert_close(with_kl[1], plain[1] + kl[1], rtol=1e-12, atol=1e-15)
    for bad, said in (
        ({"real_tau": 0.0}, "real_tau is 0"),
        ({"correction": RolloutCorrection("token_mask")}, "--rollout_importance_sampling_mode"),
        ({"off_policy_delta": 0.1}, "--off_policy_sequence_mask_delta"),
        ({"entropy_filter": True}, "--top_entropy_quantile"),
    ):
        with pytest.raises(ConfigError, match=said):
            REALSettings(**bad)  # type: ignore[arg-type]


# -- Clip-Cov and KL-Cov


def covariances(given: LossInputs) -> np.ndarray:
    assert given.advantages is not None
    lps, a = given.logprobs.detach().numpy(), given.advantages.numpy()
    return (lps - lps.mean()) * (a - a.mean())


def test_the_means_are_those_of_the_tokens() -> None:
    given = step(GRPOSettings())
    assert given.advantages is not None
    sums = [sum(row) for row in per_row(given, given.logprobs.detach())]
    logprob, advantage = step_means(sums, ADVANTAGES, LENGTHS)
    assert logprob == pytest.approx(given.logprobs.mean().item())
    assert advantage == pytest.approx(given.advantages.mean().item())
    assert step_means([-5.0, -1.0], [1.0, 3.0], [0, 2]) == (-0.5, 3.0), (
        "a row that is left out does not count"
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_kl_cov_takes_the_tokens_with_the_largest_covariance(share: float) -> None:
    settings = KLCovSettings(beta=0.0, kl_cov_ratio=share, kl_cov_coef=0.7)
    given = prepared("kl_cov", step(settings), GROUPS)
    count = max(int(share * sum(LENGTHS)), 1)
    largest = set(np.argsort(-covariances(given))[:count].tolist())
    assert set(torch.nonzero(given.columns[SELECTED]).flatten().tolist()) == largest
    out = get_loss("kl_cov")(given)
    assert out.token_loss is not None
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    assert given.advantages is not None
    for t in range(sum(LENGTHS)):
        gap = (given.logprobs[t] - given.columns["old_logprobs"][t]).item()
        a, rho = given.advantages[t].item(), math.exp(gap)
        held = 0.7 if t in largest else 0.0
        assert out.token_loss[t].item() == pytest.approx(-rho * a + held * abs(gap), rel=1e-12)
        assert grad[t].item() == pytest.approx(-rho * a + held * math.copysign(1, gap), rel=1e-12)
    assert out.metrics.result()["kl_cov/selected"] == pytest.approx(count / sum(LENGTHS))


def test_clip_cov_draws_among_the_tokens_within_bounds() -> None:
    settings = ClipCovSettings(beta=0.0, clip_cov_ratio=0.2, clip_cov_low=-0.2, clip_cov_high=1.0)
    inside = set(np.flatnonzero((covariances(step(settings)) > -0.2) & (covariances(step(settings)) < 1.0)))
    drawn: list[set[int]] = []
    plain = get_loss("grpo")(step(GRPOSettings(beta=0.0))).token_loss
    for number in range(40):
        given = prepared("clip_cov", step(settings), GROUPS, RANKS, number)
        again = prepared("clip_cov", step(settings), GROUPS, None, number)
        torch.testing.assert_close(given.columns[SELECTED], again.columns[SELECTED])
        chosen = set(torch.nonzero(given.columns[SELECTED]).flatten().tolist())
        assert len(chosen) == int(0.2 * sum(LENGTHS))
        assert chosen <= inside
        loss = get_loss("clip_cov")(given).token_loss
        torch.testing.assert_close(loss, torch.where(given.columns[SELECTED] > 0, 0.0, plain))
        drawn.append(chosen)
    assert set().union(*drawn) == inside, "sooner or later each of them"
    few = replace(settings, clip_cov_ratio=1.0)
    all_inside = prepared("clip_cov", step(few), GROUPS).columns[SELECTED]
    assert set(torch.nonzero(all_inside).flatten().tolist()) == inside, "there are no more"


def test_without_chosen_tokens_they_are_what_they_stand_on() -> None:
    none = ClipCovSettings(beta=0.0, clip_cov_low=1e8, clip_cov_high=1e9)
    given = prepared("clip_cov", step(none), GROUPS)
    plain = get_loss("grpo")(step(GRPOSettings(beta=0.0))).token_loss
    torch.testing.assert_close(get_loss("clip_cov")(given).token_loss, plain)
    free = prepared("kl_cov", step(KLCovSettings(beta=0.0, kl_cov_ratio=1.0, kl_cov_coef=0.0)), GROUPS)
    wide = step(GRPOSettings(beta=0.0, epsilon=1.0, epsilon_high=1e9))
    torch.testing.assert_close(get_loss("kl_cov")(free).token_loss, get_loss("grpo")(wide).token_loss)
    with pytest.raises(ConfigError, match="clip_cov_low 5 is not below clip_cov_high 5"):
        ClipCovSettings(clip_cov_low=5.0)


def test_a_tokens_place_in_the_draw_is_its_rows_and_steps_alone() -> None:
    order = TokenOrder(-1.0, 0.0, (-10.0, 10.0), 7, 1)
    keys = token_keys([-0.5, -2.0, -1.5], 1.0, 4, order)
    assert keys.dtype == np.float32
    np.testing.assert_array_equal(keys, token_keys([-0.5, -2.0, -1.5], -1.0, 4, order))
    assert not np.array_equal(keys, token_keys([-0.5, -2.0, -1.5], 1.0, 5, order))
    assert not np.array_equal(keys, token_keys([-0.5, -2.0, -1.5], 1.0, 4, replace(order, step=8)))
    assert np.isinf(token_keys([-0.5], 100.0, 4, order)).all(), "out of bounds"
