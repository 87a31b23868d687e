"""Corners of every loss and option: extreme ratios, empty rows, everything masked, one token; and that no cut
into micro-batches shows. What each formula is, the other files of this folder hold against its paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms import aot
from raytune_rl.algorithms.advantages import decoupled_advantages, group_advantages
from raytune_rl.algorithms.aggregation import lengths_in_loss, pair_weights, row_weights
from raytune_rl.algorithms.correction import MODES, RolloutCorrection
from raytune_rl.algorithms.divergence import DIVERGENCES
from raytune_rl.algorithms.dpo_losses import PAIR_LOSSES, WITH_DIVERGENCE
from raytune_rl.algorithms.gae import gae, token_rewards
from raytune_rl.algorithms.kl import k1, k2, k3
from raytune_rl.algorithms.losses.cispo import CISPOSettings
from raytune_rl.algorithms.losses.dpo import BCO_SHIFT, DPOSettings
from raytune_rl.algorithms.losses.dppo import DPPOSettings
from raytune_rl.algorithms.losses.fipo import FIPOSettings
from raytune_rl.algorithms.losses.gmpo import GMPOSettings
from raytune_rl.algorithms.losses.gpg import GPGSettings
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.kpop import KPopSettings
from raytune_rl.algorithms.losses.ppo import clipped_value_loss
from raytune_rl.algorithms.losses.sapo import SAPOSettings
from raytune_rl.algorithms.losses.vespo import VESPOSettings
from raytune_rl.algorithms.policy_loss import PolicySettings
from raytune_rl.algorithms.ratio import LEVELS
from raytune_rl.algorithms.registry import LossInputs, get_loss
from tests.algorithms.step import F64, make_pairs, make_step, rows_of, step_result, take

# -- policy losses: every loss type with every option

LENGTHS = (5, 1, 9, 0, 6, 2)
ADVANTAGES = (1.3, -0.7, -1.1, 2.0, 0.0, -2.0)
CUTS = [[[0], [1], [2], [3], [4], [5]], [[4, 0], [], [2, 3, 1, 5]]]
POLICIES: dict[str, tuple[str, Callable[..., PolicySettings], dict[str, Any]]] = {
    **{kind: ("grpo", GRPOSettings, {}) for kind in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "delta": ("grpo", GRPOSettings, {"epsilon_high": 0.28, "delta": 1.5}),
    "cispo": ("cispo", CISPOSettings, {"epsilon_high": 1.2}),
    "sapo": ("sapo", SAPOSettings, {}),
    "fipo": ("fipo", FIPOSettings, {"delta": 1.5, "fipo_clip_high_only": False}),
    "gmpo": ("gmpo", GMPOSettings, {}),
    "gpg": ("gpg", GPGSettings, {}),
    "luspo": ("luspo", GRPOSettings, {"epsilon_high": 0.28}),
    "vespo": ("vespo", VESPOSettings, {}),
    "dppo_tv": ("dppo_tv", DPPOSettings, {}),
    "dppo_kl": ("dppo_kl", DPPOSettings, {"dppo_cap": 1.1}),
    "kpop": ("kpop", KPopSettings, {"kpop_tau": 0.0}),
    "fipo without bounds": ("fipo", FIPOSettings, {"fipo_clip_range": 0.0}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "k2": {"beta": 0.1, "kl_estimator": "k2"},
    "k3": {"beta": 0.1},
    "off-policy mask": {"beta": 0.1, "off_policy_delta": 0.3},
    "entropy": {"beta": 0.1, "entropy_filter": True},
    **{mode: {"beta": 0.1, "correction": RolloutCorrection(mode, 1.15)} for mode in MODES},
    "icepop": {"beta": 0.0, "correction": RolloutCorrection("token_mask", 1.15, 0.8)},
}


def goes_together(policy: str, option: str, level: str) -> bool:
    """DPPO and KPop correct by themselves, and some losses have one level."""
    if policy.startswith(("dppo", "kpop")) and "correction" in OPTIONS[option]:
        return False
    return level == get_loss(POLICIES[policy][0]).fixed.get("importance_sampling_level", level)


CASES = [case for case in itertools.product(POLICIES, OPTIONS, LEVELS) if goes_together(*case)]


def policy_step(policy: str, option: str, level: Any, lengths: Any = LENGTHS) -> tuple[str, LossInputs]:
    name, settings, own = POLICIES[policy]
    chosen = settings(importance_sampling_level=level, **own, **OPTIONS[option])
    rows = len(lengths)
    given = make_step(lengths, chosen, advantages=ADVANTAGES[:rows], entropy_threshold=[0.5] * rows)
    entropy = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1)).to(F64)
    return name, replace(given, columns={**given.columns, "entropy": entropy})


def weights_of(policy: str, lengths: Any) -> np.ndarray:
    kind = get_loss(POLICIES[policy][0]).normaliser
    return row_weights(lengths, kind, max_completion_length=12)


@pytest.mark.parametrize(("policy", "option", "level"), CASES)
def test_no_cut_of_a_step_shows(policy: str, option: str, level: Any) -> None:
    name, given = policy_step(policy, option, level)
    weights = weights_of(policy, LENGTHS)
    whole = step_result(name, given, weights)
    assert whole[1].abs().sum() > 0
    for cut in CUTS:
        parts = step_result(name, given, weights, cut=cut)
        assert parts[0] == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
        assert parts[2] == pytest.approx(whole[2], rel=1e-12)


@pytest.mark.parametrize(("policy", "option", "level"), CASES)
def test_extreme_log_probs_stay_finite(policy: str, option: str, level: Any) -> None:
    """In float32, as in a run; policies that are far apart in both directions within one row."""
    name, given = policy_step(policy, option, level, (2, 1))
    for gap, advantage in itertools.product((50.0, 1e4, math.inf), (-1.0, 0.0, 1.0)):
        logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        far = torch.tensor([-1.0 - gap, -2.0 + gap, -0.5 - gap])
        columns = {"old_logprobs": far, "ref_logprobs": -far, "rollout_logprobs": -far}
        columns["entropy"] = torch.ones(3)
        odd = replace(given, logprobs=logprobs, columns=columns, advantages=torch.full((3,), advantage))
        out = get_loss(name)(odd)
        assert out.token_loss is not None
        (grad,) = torch.autograd.grad(out.token_loss.sum(), logprobs)
        assert torch.isfinite(out.token_loss).all()
        assert torch.isfinite(grad).all()
        assert all(math.isfinite(value) for value in out.metrics.result().values())


@pytest.mark.parametrize(("policy", "option", "level"), CASES)
def test_nothing_to_learn_from_is_nothing(policy: str, option: str, level: Any) -> None:
    """Every completion cut off; groups of equal rewards without a KL; rows without tokens; no rows."""
    name, given = policy_step(policy, option, level)
    cut_off = lengths_in_loss(LENGTHS, [True] * 6, True)
    loss, grad, _ = step_result(name, given, weights_of(policy, cut_off))
    assert (loss, grad.abs().sum().item()) == (0.0, 0.0)
    equal = group_advantages([0.1] * 6, [0, 0, 0, 1, 1, 1]).advantages
    still = replace(given, advantages=torch.from_numpy(equal).double()[given.row_of])
    _, grad, _ = step_result(name, still, weights_of(policy, LENGTHS))
    assert bool(grad.abs().sum() > 0) == (given.settings.beta > 0), "only the KL pulls"
    for lengths in ((0, 0), ()):
        name, empty = policy_step(policy, option, level, lengths or (0,))
        part, _ = take(empty, list(range(len(lengths))))
        out = get_loss(name)(part)
        assert out.token_loss is not None
        assert out.token_loss.sum().item() == 0.0
        assert "kl" not in out.metrics.result()


@pytest.mark.parametrize(("policy", "option"), sorted({case[:2] for case in CASES}))
def test_one_token_a_row_makes_all_levels_and_means_equal(policy: str, option: str) -> None:
    made = []
    for level in LEVELS:
        name, given = policy_step(policy, option, level, (1, 1, 1))
        made.append(step_result(name, given, weights_of(policy, (1, 1, 1))))
    for loss, grad, _ in made[1:]:
        assert loss == pytest.approx(made[0][0], rel=1e-12)
        torch.testing.assert_close(grad, made[0][1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_the_kl_to_itself_is_nothing_and_far_away_it_is_finite(estimate: Any) -> None:
    logprobs = torch.tensor([-1.0, -30.0, 0.0], requires_grad=True)
    assert estimate(logprobs, logprobs.detach()).abs().sum() == 0
    far = estimate(logprobs, torch.tensor([-1e4, 1e4, -math.inf if estimate is not k1 else -1e9]))
    (grad,) = torch.autograd.grad(far.sum(), logprobs)
    assert torch.isfinite(far).all()
    assert torch.isfinite(grad).all()


def test_advantages_do_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 3))
    values[2, 1] = np.nan
    groups, order = np.repeat([4, 9, 2], 4), rng.permutation(12)
    whole = decoupled_advantages(values, [1.0, 0.5, 2.0], groups)
    mixed = decoupled_advantages(values[order], [1.0, 0.5, 2.0], groups[order])
    np.testing.assert_allclose(mixed, whole[order], rtol=1e-5)
    for estimator, scale in itertools.product(
        ("grpo", "rloo", "reinforce_plus_plus"), ("group", "batch", "none")
    ):
        whole = group_advantages(values[:, 1], groups, scale, estimator=estimator).advantages  # type: ignore[arg-type]
        mixed = group_advantages(values[order, 1], groups[order], scale, estimator=estimator).advantages  # type: ignore[arg-type]
        np.testing.assert_allclose(mixed, whole[order], rtol=1e-5)


# -- pairs: what is not one loss of one divergence

PAIR_LENGTHS = (5, 3, 1, 1, 2, 7, 4, 0)
PAIR_CUTS = [[[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 7, 0, 1], [], [4, 5, 2, 3]]]
MIXTURES: dict[str, DPOSettings] = {
    "aot": DPOSettings(loss_type=("aot",), label_smoothing=0.1),
    "aot_unpaired": DPOSettings(loss_type=("aot_unpaired",)),
    "bco with its shift": DPOSettings(loss_type=("bco_pair",), bco_shift=True),
    "mpo": DPOSettings(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    "everything": DPOSettings(
        loss_type=(*(k for k in PAIR_LOSSES if k != "discopop"), "aot", "aot_unpaired", "sft"),
        label_smoothing=0.1,
        rpo_alpha=0.5,
        bco_shift=True,
    ),
    **{
        f"{kind} {divergence}": DPOSettings(
            loss_type=(kind,),
            f_divergence_type=divergence,
            label_smoothing=0.1 if kind in ("sigmoid", "robust", "exo_pair") else 0.0,
            ld_alpha=0.5,
            rpo_alpha=0.5,
        )
        for kind in WITH_DIVERGENCE
        for divergence in DIVERGENCES
    },
}


def with_row_values(given: LossInputs) -> LossInputs:
    """With what the driver works out for the whole step."""
    sums = [
        torch.zeros(given.n_rows, dtype=F64).index_add(0, given.row_of, column.detach().double()).numpy()
        for column in (given.logprobs, given.columns["ref_logprobs"])
    ]
    ratio = sums[0] - sums[1]
    values = {
        aot.REFERENCE: aot.paired_partners(sums[0][0::2] - sums[0][1::2], sums[1][0::2] - sums[1][1::2]),
        aot.PARTNER: aot.unpaired_partners(ratio[0::2], ratio[1::2]),
        BCO_SHIFT: np.full(given.n_rows, given.settings.beta * ratio.mean() if len(ratio) else 0.0),
    }
    more = {name: torch.from_numpy(value) for name, value in values.items()}
    return replace(given, row_values={**given.row_values, **more})


def pair_step(settings: DPOSettings, lengths: Any = PAIR_LENGTHS) -> LossInputs:
    return with_row_values(make_pairs(lengths, settings, seed=14))


def run(given: LossInputs, cut: Any = None) -> tuple[float, torch.Tensor, dict[str, float]]:
    weights = pair_weights(np.bincount(given.row_of, minlength=given.n_rows))
    return step_result("dpo", given, weights.weight, weights.row_weight, cut)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_cut_of_pairs_shows(mixture: str) -> None:
    given = pair_step(MIXTURES[mixture])
    whole = run(given)
    assert whole[1].abs().sum() > 0
    for cut in PAIR_CUTS:
        parts = run(given, cut)
        assert parts[0] == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
        assert parts[2] == pytest.approx(whole[2], rel=1e-12)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_extreme_and_empty_pairs_stay_finite(mixture: str) -> None:
    settings = MIXTURES[mixture]
    for lengths in ((0, 0), (0, 4), (1, 1)):
        loss, grad, _ = run(pair_step(settings, lengths))
        assert math.isfinite(loss)
        assert torch.isfinite(grad).all()
    for gap, signs in itertools.product((30.0, 1e4, 1e6), itertools.product((1, -1), repeat=2)):
        logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        given = replace(make_pairs((1, 1), settings), logprobs=logprobs)
        columns = {"ref_logprobs": logprobs.detach() - gap * torch.tensor(signs)}
        given = with_row_values(replace(given, columns=columns))
        loss_of = get_loss("dpo")(given).total(torch.ones(2, dtype=F64), torch.ones(2, dtype=F64))
        (slope,) = torch.autograd.grad(loss_of, logprobs)
        assert torch.isfinite(loss_of)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_aot_at_the_reference_and_of_a_single_pair(kind: str) -> None:
    """At the reference it pushes the sides apart; the order of one pair is no order, and that is DPO."""
    chosen = DPOSettings(loss_type=(kind,), beta=0.3)
    at = make_pairs((3, 3), chosen)
    loss, grad, _ = run(with_row_values(replace(at, columns={"ref_logprobs": at.logprobs.detach()})))
    assert loss == pytest.approx(math.log(2))
    assert grad[:3].max() < 0 < grad[3:].min()
    one = pair_step(chosen, (4, 2))
    plain = run(replace(one, settings=DPOSettings(beta=0.3)))
    assert run(one)[0] == pytest.approx(plain[0], rel=1e-12)
    torch.testing.assert_close(run(one)[1], plain[1], rtol=1e-12, atol=1e-15)
    assert run(replace(pair_step(chosen), settings=replace(chosen, beta=0.0)))[1].abs().sum() == 0


# -- PPO


def test_values_and_rewards_far_out_stay_finite() -> None:
    values = torch.tensor([1e15, -1e15, 0.0], requires_grad=True)
    loss, metrics = clipped_value_loss(values, torch.zeros(3), torch.tensor([-1e15, 0.0, 1e15]))
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()
    assert math.isfinite(metrics.result()["val/clipfrac_avg"])
    empty, none = clipped_value_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert empty.sum() == 0
    assert none.result() == {}
    row_of = rows_of((2, 0, 1))
    rewards = token_rewards(torch.tensor([1e9, 5.0, -1e9]), torch.zeros(3), torch.full((3,), -1e6), row_of, 3)
    found = gae(rewards, torch.tensor([1e6, -1e6, 0.0]), row_of, 3)
    assert torch.isfinite(found.advantages).all()
    assert torch.isfinite(found.returns).all()


def test_one_token_is_its_reward_less_what_was_foreseen() -> None:
    row_of = rows_of((1, 1))
    rewards = token_rewards(
        torch.tensor([2.0, -1.0]),
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-1.5, -2.0]),
        row_of,
        2,
        kl_coef=0.1,
    )
    found = gae(rewards, torch.tensor([0.5, 0.25]), row_of, 2, gamma=0.9, lam=0.7)
    assert found.advantages.tolist() == pytest.approx([2.0 - 0.05 - 0.5, -1.0 - 0.25])
    assert found.returns.tolist() == pytest.approx([1.95, -1.0])
