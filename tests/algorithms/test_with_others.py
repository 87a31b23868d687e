"""Losses and credits that learn from somebody beside the rewards: SDAR and RLSD from a teacher, CHORD from an
expert, ReMax against the likeliest answer. Formulas are written out here, in Python floats.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.credit.remax import remax_advantages
from raytune_rl.algorithms.credit.rlsd import Reweighed, SelfDistilled
from raytune_rl.algorithms.experience import join
from raytune_rl.algorithms.losses.chord import CHORDSettings, mu
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.sdar import SDARSettings
from raytune_rl.algorithms.registry import EXPERT, LossInputs, get_loss
from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.protocol.rows import TrainBatch
from tests.algorithms.step import F64, make_step, step_result
from tests.algorithms.test_experience import experience

NAN, INF = float("nan"), float("inf")
LENGTHS = (5, 1, 9, 0, 6, 2)
ADVANTAGES = (1.3, -0.7, -1.1, 2.0, 0.0, -2.0)
CUTS = [[[0], [1], [2], [3], [4], [5]], [[4, 0], [], [2, 3, 1, 5]]]
GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "beta": 0.0}


# -- SDAR


def taught(settings: SDARSettings) -> LossInputs:
    given = make_step(LENGTHS, settings, advantages=ADVANTAGES)
    noise = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(9), dtype=F64)
    return replace(given, columns={**given.columns, "teacher_logprobs": given.logprobs.detach() + noise})


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_sdar_is_grpo_and_the_gated_gap(beta: float) -> None:
    settings = SDARSettings(beta=beta, sdar_loss_coef=0.3, sdar_gate_beta=2.0)
    given = taught(settings)
    plain = replace(given, settings=GRPOSettings(beta=beta))
    found, base = (get_loss(name)(one).token_loss for name, one in (("sdar", given), ("dapo", plain)))
    assert found is not None
    assert base is not None
    (grad,) = torch.autograd.grad(found.sum(), given.logprobs, retain_graph=True)
    (grad_base,) = torch.autograd.grad(base.sum(), given.logprobs, retain_graph=True)
    for token in range(sum(LENGTHS)):
        gap = (given.columns["teacher_logprobs"] - given.logprobs)[token].item()
        gate = 1 / (1 + math.exp(-2.0 * gap))
        assert (found - base)[token].item() == pytest.approx(0.3 * gate * gap, rel=1e-12)
        assert float(grad[token] - grad_base[token]) == pytest.approx(-0.3 * gate, rel=1e-12)


def no_cut_shows(loss: str, given: LossInputs, weights: np.ndarray) -> None:
    """Loss, gradient and metrics of a step are the same however it is cut."""
    whole = step_result(loss, given, weights)
    for cut in CUTS:
        parts = step_result(loss, given, weights, cut=cut)
        assert parts[0] == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
        assert parts[2] == pytest.approx(whole[2], rel=1e-12)


def test_no_cut_of_a_step_shows_in_sdar() -> None:
    given = taught(SDARSettings(beta=0.1, correction=RolloutCorrection("token_truncate", 1.15)))
    weights = row_weights(LENGTHS, "sdar")
    no_cut_shows("sdar", given, weights)


@pytest.mark.parametrize("said", [-INF, -1e4, 1e4])
def test_a_teacher_who_deems_a_token_impossible_or_sure_is_no_nan(said: float) -> None:
    given = taught(SDARSettings(beta=0.0))
    given = replace(given, columns={**given.columns, "teacher_logprobs": torch.full((23,), said).double()})
    loss, grad, metrics = step_result("sdar", given, row_weights(LENGTHS, "sdar"))
    assert math.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert metrics["sdar/gate"] == pytest.approx(float(said > 0), abs=1e-6)


# -- RLSD


@pytest.mark.parametrize(
    ("share", "clip", "negative_only"), [(0.5, 0.2, False), (1.0, 0.9, False), (0.7, 0.3, True)]
)
def test_rlsd_spreads_an_advantage_over_tokens(share: float, clip: float, negative_only: bool) -> None:
    draw = np.random.default_rng(0)
    teacher, old = (-3 * draw.random(40).astype(np.float32) for _ in range(2))
    earned = np.repeat([1.5, -0.5, 0.0, 2.0], 10).astype(np.float32)
    found = Reweighed(share, clip, negative_only)(earned, teacher, old)
    for token in range(40):
        a = float(earned[token])
        weight = math.exp(math.copysign(1, a) * (float(teacher[token]) - float(old[token]))) if a else 1.0
        weight = 1 - share + share * min(max(weight, 1 - clip), 1 + clip)
        if negative_only and a >= 0:
            weight = 1.0
        assert found[token].item() == pytest.approx(a * weight, rel=1e-6)
    assert (np.sign(found) == np.sign(earned)).all(), "no advantage changes its sign"


def test_rlsd_without_share_is_grpo_and_extremes_are_clipped() -> None:
    earned = np.array([1.0, -1.0, 1.0, -1.0], dtype=np.float32)
    far = np.array([-INF, -INF, 1e4, 1e4], dtype=np.float32)
    here = np.zeros(4, dtype=np.float32)
    assert (Reweighed(0.0, 0.2)(earned, far, here) == earned).all()
    np.testing.assert_allclose(Reweighed(1.0, 0.2)(earned, far, here), [0.8, -1.2, 1.2, -0.8], rtol=1e-6)


def test_rlsds_share_warms_up_and_decays() -> None:
    def shares(**flags: Any) -> list[float]:
        return [SelfDistilled(rlsd_lambda=0.8, **flags).share(step) for step in range(6)]

    assert shares() == [0.8] * 6
    assert shares(rlsd_lambda_warmup_steps=4) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    both = shares(rlsd_lambda_warmup_steps=2, rlsd_lambda_decay_steps=2)
    assert both == pytest.approx([0, 0.4, 0.8, 0.4, 0, 0])


def test_rlsd_is_grpo_until_the_teacher_is_asked() -> None:
    config = RLHFConfig(**GIVEN, advantage_estimator="rlsd", teacher_model="t")
    credit = algorithm_of(config).credit
    assert credit.advice(0) == Reweighed(0.5, 0.2)
    assert "teacher_advantages" in credit.needs
    grpo = algorithm_of(RLHFConfig(**GIVEN)).credit
    found, batch = experience([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]), cast(TrainBatch, "batch")
    both = [one.assign(found, batch, cast(Any, None)).advantages.tolist() for one in (credit, grpo)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"advantage_estimator": "rlsd"}, "needs somebody to learn from"),
        ({"loss_type": "sdar"}, "needs somebody to learn from"),
        ({"advantage_estimator": "rlsd", "teacher_model": ["a", "b"]}, "takes one teacher a row"),
        ({"loss_type": "sdar", "teacher_model": ["a", "b"]}, "takes one teacher a row"),
        ({"advantage_estimator": "rlsd", "teacher_model": "a", "loss_type": "sdar"}, "both learn from the"),
        ({"loss_type": "chord"}, "learns from an expert's answers too: --chord_sft_dataset"),
        ({"advantage_estimator": "remax", "async_generate": True}, "not asked for ahead of the training"),
    ],
)
def test_what_cannot_go_together_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algorithm_of(RLHFConfig(**GIVEN, **flags))


# -- CHORD


def mixed(settings: CHORDSettings) -> LossInputs:
    """Rows 1 and 4 are an expert's: of them nobody knows a ratio, a reference or what an engine said."""
    expert = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    given = make_step(LENGTHS, settings, advantages=ADVANTAGES, **{EXPERT: expert})
    theirs = given.row_values[EXPERT][given.row_of] > 0
    columns = {n: torch.where(theirs, 0.0, c) for n, c in given.columns.items()}
    columns["rollout_logprobs"] = torch.where(theirs, NAN, columns["rollout_logprobs"])
    return replace(given, columns=columns)


@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_chord_is_grpo_of_the_ones_and_the_likelihood_of_the_others(phi: bool, beta: float) -> None:
    more: dict[str, Any] = {"beta": beta, "correction": RolloutCorrection("token_truncate", 1.15)}
    given = mixed(CHORDSettings(chord_enable_phi_function=phi, **more))
    whole = make_step(LENGTHS, GRPOSettings(**more), advantages=ADVANTAGES)
    found, base = (get_loss(n)(one).token_loss for n, one in (("chord", given), ("grpo", whole)))
    assert found is not None
    assert base is not None
    (grad,) = torch.autograd.grad(found.sum(), given.logprobs, retain_graph=True)
    (grad_base,) = torch.autograd.grad(base.sum(), whole.logprobs, retain_graph=True)
    for token, row in enumerate(given.row_of.tolist()):
        if row in (1, 4):
            log_p = given.logprobs[token].item()
            weight = math.exp(log_p) * (1 - math.exp(log_p)) if phi else 1.0
            assert found[token].item() == pytest.approx(-weight * log_p, rel=1e-12)
            assert float(grad[token]) == pytest.approx(-weight, rel=1e-12)
        else:
            assert found[token].item() == pytest.approx(base[token].item(), rel=1e-12)
            assert float(grad[token]) == pytest.approx(float(grad_base[token]), rel=1e-12)


def test_no_cut_of_a_step_shows_in_chord() -> None:
    given = mixed(CHORDSettings(beta=0.1, chord_enable_phi_function=True))
    weights = row_weights(LENGTHS, "rows")
    no_cut_shows("chord", given, weights)


def test_chord_on_a_micro_batch_without_rows_stays_in_the_graph() -> None:
    empty = make_step((), CHORDSettings(beta=0.0), advantages=(), **{EXPERT: []})
    loss = get_loss("chord")(empty).token_loss
    assert loss is not None
    loss.sum().backward()
    assert empty.logprobs.grad is not None


def test_an_experts_answer_that_is_sure_or_impossible_teaches_nothing_by_phi() -> None:
    given = mixed(CHORDSettings(beta=0.0, chord_enable_phi_function=True))
    logprobs = torch.where(
        given.row_of == 1, -0.0, torch.where(given.row_of == 4, -800.0, given.logprobs.detach())
    )
    given = replace(given, logprobs=logprobs.requires_grad_())
    loss = get_loss("chord")(given).token_loss
    assert loss is not None
    (grad,) = torch.autograd.grad(loss.sum(), given.logprobs)
    assert grad[(given.row_of == 1) | (given.row_of == 4)].abs().max() == 0


def test_mu_rises_and_falls() -> None:
    settings = CHORDSettings(
        chord_mu_peak=0.9, chord_mu_valley=0.1, chord_mu_warmup_steps=2, chord_mu_decay_steps=4
    )
    shares = [mu(settings, step) for step in range(9)]
    falling = [0.1 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert shares == pytest.approx([0.0, 0.45, *falling, 0.1, 0.1, 0.1])
    constant = CHORDSettings(chord_mu_peak=0.1, chord_mu_valley=0.1, chord_mu_decay_steps=0)
    assert [mu(constant, step) for step in (0, 7)] == [0.1, 0.1]
    with pytest.raises(ConfigError, match="chord_mu_peak is 2"):
        CHORDSettings(chord_mu_peak=2)


# -- ReMax


def test_remax_is_the_gap_to_the_likeliest_answer() -> None:
    rewards, greedy = np.array([1.0, 0.25, NAN, 0.5, 0.5]), np.array([0.5, 0.5, 0.5, NAN, 0.5])
    assert remax_advantages(rewards, greedy).tolist() == [0.5, -0.25, 0.0, 0.0, 0.0]


def test_a_group_teaches_remax_where_a_reward_differs_from_the_greedy_one() -> None:
    credit = algorithm_of(RLHFConfig(**GIVEN, advantage_estimator="remax", num_generations=1)).credit
    found = replace(experience([1.0], [0.0], [1.0]), greedy=np.array([1.0, 1.0, NAN]))
    assert credit.wants_greedy
    assert credit.informative(found) == {1}
    credited = credit.assign(found, cast(TrainBatch, "batch"), cast(Any, None))
    assert credited.advantages.tolist() == [0.0, -1.0, 0.0]
    assert credited.metrics == {"remax/greedy_reward": 1.0, "unscored_completions": 0.0}


def test_greedy_rewards_go_with_their_groups() -> None:
    parts = [
        replace(experience([1.0, 0.0], [0.5, 0.5]), greedy=np.array([0.1, 0.1, 0.2, 0.2])) for _ in range(2)
    ]
    whole = join(parts)
    assert whole.greedy is not None
    assert whole.greedy.tolist() == [0.1, 0.1, 0.2, 0.2] * 2
    chosen = whole.of_groups({1, 2}).greedy
    assert chosen is not None
    assert chosen.tolist() == [0.2, 0.2, 0.1, 0.1]
    assert join([parts[0], experience([1.0, 0.0])]).greedy is None
