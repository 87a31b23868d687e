"""GSPO, CISPO, SAPO, filters and corrections against their papers, row by row in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.correction import RolloutCorrection, correction_weights
from raytune_rl.algorithms.losses.cispo import CISPOSettings
from raytune_rl.algorithms.losses.fipo import FIPOSettings
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.sapo import SAPOSettings
from raytune_rl.algorithms.policy_loss import PolicySettings
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import F64, make_step, rows_of, step_result

LENGTHS = (5, 1, 9, 0, 6, 2)
ADVANTAGES = (1.3, -0.7, -1.1, 2.0, 0.0, -2.0)
CUTS = [[[0], [1], [2], [3], [4], [5]], [[4, 0], [2, 3, 1, 5]], [[5, 4, 3, 2, 1, 0], []]]


def step(settings: PolicySettings, **more: Any) -> LossInputs:
    return make_step(LENGTHS, settings, advantages=ADVANTAGES, **more)


def rows(inputs: LossInputs, column: Tensor) -> list[list[float]]:
    return [column[inputs.row_of == row].tolist() for row in range(inputs.n_rows)]


# -- ratio levels


def clipped(rho: float, a: float, low: float, high: float) -> float:
    return -min(rho * a, min(max(rho, 1 - low), 1 + high) * a)


@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_gspo_is_the_papers_objective(spread: float) -> None:
    """J = mean_i min(s_i A_i, clip(s_i) A_i), s_i = (pi(y) / pi_old(y))^(1 / |y|), with its gradient."""
    low, high = 0.003, 0.2
    given = step(
        GRPOSettings(epsilon=low, epsilon_high=high, beta=0.0, importance_sampling_level="sequence"),
        spread=spread,
    )
    loss, grad, metrics = step_result("grpo", given, row_weights(LENGTHS, "grpo"))
    want, slope, low_clips = 0.0, [], []
    old = rows(given, given.columns["old_logprobs"])
    for lps, olds, a in zip(rows(given, given.logprobs), old, ADVANTAGES, strict=True):
        if not lps:
            continue
        s = math.exp((sum(lps) - sum(olds)) / len(lps))
        value = clipped(s, a, low, high)
        want += value / len(LENGTHS)
        moves = value == -s * a
        slope += [-s * a / len(lps) / len(LENGTHS) if moves else 0.0] * len(lps)
        low_clips.append(a < 0 and s < 1 - low)
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=F64), rtol=1e-10, atol=1e-14)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(sum(low_clips) / 5), "one vote a completion"


def test_sequence_token_has_the_value_of_gspo_and_token_gradients() -> None:
    """GSPO-token: with one advantage a row its value and its gradient are those of GSPO."""
    sequence, by_token = (
        step(GRPOSettings(beta=0.0, importance_sampling_level=level))
        for level in ("sequence", "sequence_token")
    )
    weight = row_weights(LENGTHS, "grpo")
    loss, grad, metrics = step_result("grpo", sequence, weight)
    loss_t, grad_t, metrics_t = step_result("grpo", by_token, weight)
    assert loss_t == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(grad_t, grad, rtol=1e-12, atol=1e-15)
    assert metrics_t == pytest.approx(metrics)
    assert grad.abs().sum() > 0


def test_sequence_token_tells_tokens_apart() -> None:
    """With an advantage a token (GSPO-token's reason to be) each moves by its own: s_i * -A_t."""
    given = step(
        GRPOSettings(beta=0.0, importance_sampling_level="sequence_token", epsilon=1.0, epsilon_high=99)
    )
    advantages = torch.linspace(-1, 2, sum(LENGTHS), dtype=F64)
    out = get_loss("grpo")(replace(given, advantages=advantages))
    assert out.token_loss is not None
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    gap = (given.logprobs - given.columns["old_logprobs"]).detach()
    s = torch.stack([gap[given.row_of == r].mean().exp() for r in range(6)])[given.row_of]
    torch.testing.assert_close(grad, -s * advantages, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_one_token_makes_all_levels_equal(level: str) -> None:
    made = [
        make_step((1, 1, 1), GRPOSettings(importance_sampling_level=at), advantages=(1.0, -2.0, 0.5))  # type: ignore[arg-type]
        for at in ("token", level)
    ]
    token, row = (step_result("grpo", given, row_weights((1, 1, 1), "grpo")) for given in made)
    assert row[0] == pytest.approx(token[0], rel=1e-12)
    torch.testing.assert_close(row[1], token[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize(
    ("name", "settings"), [("grpo", GRPOSettings), ("cispo", CISPOSettings), ("sapo", SAPOSettings)]
)
def test_identical_policies_give_the_plain_policy_gradient(
    name: str, settings: Callable[..., PolicySettings], level: str
) -> None:
    """At ratio 1 every surrogate has the gradient of -A log pi, summed over tokens of a row."""
    more = {"epsilon_high": 5.0} if name == "cispo" else {}
    given = step(settings(beta=0.0, importance_sampling_level=level, **more))
    given = replace(given, columns={})
    _, grad, _ = step_result(name, given, torch.ones(6))
    assert given.advantages is not None
    torch.testing.assert_close(grad, -given.advantages, rtol=1e-12, atol=1e-12)


# -- surrogates


def test_cispo() -> None:
    """l = -sg(min(rho, cap)) A log pi: no token loses its gradient, however far off."""
    given = step(CISPOSettings(epsilon_high=1.2, beta=0.0))
    out = get_loss("cispo")(given)
    assert out.token_loss is not None
    assert given.advantages is not None
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    capped = 0
    for at in range(sum(LENGTHS)):
        lp, a = given.logprobs[at].item(), given.advantages[at].item()
        rho = math.exp(lp - given.columns["old_logprobs"][at].item())
        weight = min(rho, 1.2)
        capped += rho > 1.2 and a > 0
        assert out.token_loss[at].item() == pytest.approx(-weight * a * lp, rel=1e-12)
        assert grad[at].item() == pytest.approx(-weight * a, rel=1e-12)
    assert 0 < capped < sum(LENGTHS)
    assert out.metrics.result()["cispo_clip_ratio"] == pytest.approx(capped / sum(LENGTHS))


@pytest.mark.parametrize("cap", [None, 0.0, -1.0])
def test_cispo_has_no_default_cap(cap: float | None) -> None:
    with pytest.raises(ConfigError, match=r"5\.0 is usual"):
        CISPOSettings(epsilon_high=cap)


def test_sapo() -> None:
    """f(rho) = (4 / tau) sigmoid(tau (rho - 1)); gradient of it is 4 p (1 - p) rho A."""
    given = step(SAPOSettings(tau_pos=0.7, tau_neg=1.6, beta=0.0))
    out = get_loss("sapo")(given)
    assert out.token_loss is not None
    assert given.advantages is not None
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    for at in range(sum(LENGTHS)):
        a = given.advantages[at].item()
        rho = math.exp(given.logprobs[at].item() - given.columns["old_logprobs"][at].item())
        tau = 0.7 if a > 0 else 1.6
        p = 1 / (1 + math.exp(-tau * (rho - 1)))
        assert out.token_loss[at].item() == pytest.approx(-4 / tau * p * a, rel=1e-12)
        assert grad[at].item() == pytest.approx(-4 * p * (1 - p) * rho * a, rel=1e-12)


def test_sapo_defaults_and_limits() -> None:
    assert (SAPOSettings().tau_pos, SAPOSettings().tau_neg) == (1.0, 1.05)
    for bad in ({"tau_pos": 0.0}, {"tau_neg": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SAPOSettings(**bad)  # type: ignore[arg-type]
    # tau to 0: the gate opens and the surrogate becomes the unclipped -rho A, up to a constant.
    given = step(SAPOSettings(tau_pos=1e-6, tau_neg=1e-6, beta=0.0))
    _, grad, _ = step_result("sapo", given, torch.ones(6))
    assert given.advantages is not None
    ratio = (given.logprobs - given.columns["old_logprobs"]).exp().detach()
    torch.testing.assert_close(grad, -ratio * given.advantages, rtol=1e-5, atol=1e-9)


FIPO_CASES: list[dict[str, Any]] = [
    {},
    {"fipo_decay_rate": 2.0, "fipo_clip_range": 0.5, "fipo_clip_high_only": False},
    {"fipo_clip_range": 0.0, "fipo_safety_threshold": None},
    {"delta": 1.4, "fipo_safety_threshold": 1.1, "fipo_clip_range": 0.9, "fipo_clip_high_only": False},
]


@pytest.mark.parametrize("more", FIPO_CASES, ids=str)
def test_fipo(more: dict[str, Any]) -> None:
    """The clipped loss of a token times clip(exp(sum over k >= t of 2^(-(k - t) / rate) log ratio_k))."""
    settings = FIPOSettings(beta=0.0, epsilon_high=0.28, **more)
    given = step(settings)
    out = get_loss("fipo")(given)
    shared = {"delta": more["delta"]} if "delta" in more else {}
    plain = get_loss("grpo")(step(GRPOSettings(beta=0.0, epsilon_high=0.28, **shared)))
    weights, kept = [], []
    logs = rows(given, (given.logprobs - given.columns["old_logprobs"]).detach())
    for gaps, a in zip(logs, ADVANTAGES, strict=True):
        known = [0.0 if settings.delta and math.exp(g) > settings.delta else g for g in gaps]
        for t, gap in enumerate(gaps):
            future = sum(2 ** (-(k - t) / settings.fipo_decay_rate) * known[k] for k in range(t, len(gaps)))
            f, r = math.exp(future), settings.fipo_clip_range
            if r:
                f = min(max(f, 1.0 if settings.fipo_clip_high_only else 1 - r), 1 + r)
            limit = settings.fipo_safety_threshold
            kept.append(not (limit and a < 0 and math.exp(gap) > limit))
            weights.append(f if kept[-1] else min(max(f, 0.8), 1.0))
    scale = torch.tensor(weights, dtype=F64)
    assert out.token_loss is not None
    assert plain.token_loss is not None
    torch.testing.assert_close(out.token_loss, plain.token_loss * scale, rtol=1e-11, atol=1e-13)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    bare = step(GRPOSettings(beta=0.0, epsilon_high=0.28, **shared))
    loss = get_loss("grpo")(bare).token_loss
    assert loss is not None
    (slope,) = torch.autograd.grad((loss * scale).sum(), bare.logprobs)
    torch.testing.assert_close(grad, slope, rtol=1e-11, atol=1e-13)
    metrics = out.metrics.result()
    assert metrics["fipo/influence_weight_mean"] == pytest.approx(sum(weights) / len(weights))
    assert metrics["fipo/safety_keep_ratio"] == pytest.approx(sum(kept) / len(kept))


def test_fipo_on_policy_is_dapo_and_its_limits() -> None:
    given = replace(step(FIPOSettings(beta=0.0)), columns={})
    plain = replace(step(GRPOSettings(beta=0.0)), columns={})
    fipo, dapo = (step_result(name, at, torch.ones(6)) for name, at in (("fipo", given), ("grpo", plain)))
    assert fipo[0] == pytest.approx(dapo[0], rel=1e-13)
    torch.testing.assert_close(fipo[1], dapo[1], rtol=1e-13, atol=1e-15)
    assert fipo[2]["fipo/influence_weight_mean"] == 1
    for bad in ({"fipo_decay_rate": 0.0}, {"fipo_clip_range": 2.0}, {"fipo_safety_threshold": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FIPOSettings(**bad)  # type: ignore[arg-type]


def test_k2_in_the_loss() -> None:
    given = step(GRPOSettings(beta=0.3, kl_estimator="k2", epsilon=1.0, epsilon_high=99))
    zero = replace(given, advantages=torch.zeros(sum(LENGTHS), dtype=F64))
    _, grad, metrics = step_result("grpo", zero, torch.ones(6))
    gap = (given.logprobs - given.columns["ref_logprobs"]).detach()
    torch.testing.assert_close(grad, 0.3 * gap)
    assert metrics["kl"] == pytest.approx((gap**2 / 2).mean().item())
    with pytest.raises(ConfigError, match="k1"):
        GRPOSettings(kl_estimator="k1")  # type: ignore[arg-type]


# -- corrections


def correction_by_hand(given: LossInputs, how: RolloutCorrection) -> tuple[list[float], list[bool]]:
    """Weight of each token, and which ratios (of tokens, or of rows) are out of bounds."""
    weights: list[float] = []
    out: list[bool] = []
    low = 0.0 if how.floor is None else how.floor
    columns = (given.columns["old_logprobs"], given.columns["rollout_logprobs"])
    for olds, engine in zip(*(rows(given, c) for c in columns), strict=True):
        ratios = [math.exp(o - r) for o, r in zip(olds, engine, strict=True)]
        if how.mode.startswith("sequence") and ratios:
            mean = math.prod(ratios) ** (1 / len(ratios))
            out.append(not low <= mean <= how.threshold)
            ratios = [mean] * len(ratios)
        elif how.mode.startswith("token"):
            out += [not low <= w <= how.threshold for w in ratios]
        for w in ratios:
            if how.mode.endswith("truncate"):
                weights.append(min(max(w, low), how.threshold))
            else:
                weights.append(w if low <= w <= how.threshold else 0.0)
    return weights, out


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("floor", [None, 0.9])
def test_rollout_corrections(mode: Any, floor: float | None) -> None:
    how = RolloutCorrection(mode, 1.15, floor)
    given = step(GRPOSettings(beta=0.04, correction=how))
    plain = step(GRPOSettings(beta=0.04))
    weights, out = correction_by_hand(given, how)
    got, bare = get_loss("grpo")(given), get_loss("grpo")(plain)
    assert got.token_loss is not None
    assert bare.token_loss is not None
    scale = torch.tensor(weights, dtype=F64)
    torch.testing.assert_close(got.token_loss, bare.token_loss * scale, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(got.token_loss.sum(), given.logprobs)
    (bare_grad,) = torch.autograd.grad(bare.token_loss.sum(), plain.logprobs)
    torch.testing.assert_close(grad, bare_grad * scale, rtol=1e-12, atol=1e-14)
    metrics = got.metrics.result()
    n = len(weights)
    assert 0 < sum(out) < len(out), "the bounds bind somewhere, not everywhere"
    assert metrics["rollout_correction/clipped_frac"] == pytest.approx(sum(out) / len(out))
    assert metrics["rollout_correction/is_weight_mean"] == pytest.approx(sum(weights) / n)
    ess = sum(weights) ** 2 / (n * sum(w * w for w in weights))
    assert metrics["rollout_correction/ess"] == pytest.approx(ess)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_equal_policies_need_no_correction(mode: Any) -> None:
    lps = torch.randn(7, dtype=F64)
    weights, metrics = correction_weights(lps, lps, rows_of((3, 0, 4)), 3, RolloutCorrection(mode))
    assert weights.tolist() == [1.0] * 7
    assert metrics.result()["rollout_correction/ess"] == 1.0
    assert metrics.result()["rollout_correction/clipped_frac"] == 0.0


def test_without_old_logprobs_the_present_ones_stand_in() -> None:
    how = RolloutCorrection("token_truncate", 1.3)
    given = step(GRPOSettings(beta=0.0, correction=how))
    fresh = {"rollout_logprobs": given.columns["rollout_logprobs"]}
    _, grad, _ = step_result("grpo", replace(given, columns=fresh), torch.ones(6))
    assert given.advantages is not None
    weight = (given.logprobs.detach() - fresh["rollout_logprobs"]).exp().clamp(max=1.3)
    torch.testing.assert_close(grad, -weight * given.advantages, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate"])
def test_tokens_that_the_engine_did_not_score_are_not_corrected(mode: Any, bad: float) -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -2.0], dtype=F64)
    rollout = torch.tensor([-1.5, bad, -1.3, bad], dtype=F64)
    weights, _ = correction_weights(old, rollout, rows_of((3, 1)), 2, RolloutCorrection(mode))
    mean = math.exp((0.5 + 0.3) / 2)
    want = [mean] * 3 + [1.0] if mode == "sequence_truncate" else [math.exp(0.5), 1.0, math.exp(0.3), 1.0]
    assert weights.tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    "bad",
    [("token", 2.0, None), ("token_mask", 0.0, None), ("token_mask", 2.0, 2.0), ("token_mask", 2.0, -1.0)],
)
def test_impossible_corrections(bad: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="rollout_importance_sampling_"):
        RolloutCorrection(*bad)


def test_off_policy_rows_with_a_negative_advantage_are_left_out() -> None:
    """DeepSeek-V3.2: drop A < 0 rows whose mean log(pi_sampled / pi) is over delta; KL and all."""
    given = step(GRPOSettings(beta=0.1, off_policy_delta=0.3))
    out, bare = get_loss("grpo")(given), get_loss("grpo")(step(GRPOSettings(beta=0.1)))
    assert out.token_loss is not None
    assert bare.token_loss is not None
    dropped = []
    engine = rows(given, given.columns["rollout_logprobs"])
    for row, (lps, sampled) in enumerate(zip(rows(given, given.logprobs), engine, strict=True)):
        drift = sum(s - p for s, p in zip(sampled, lps, strict=True)) / max(len(lps), 1)
        if ADVANTAGES[row] < 0 and drift > 0.3:
            dropped.append(row)
    assert dropped == [1], "the example has a row that goes and rows that stay"
    gone = torch.isin(given.row_of, torch.tensor(dropped))
    torch.testing.assert_close(out.token_loss, torch.where(gone, 0.0, bare.token_loss))
    assert out.metrics.result()["off_policy_masked"] == pytest.approx(1 / 5)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    assert grad[gone].abs().sum() == 0
    assert grad[~gone].abs().sum() > 0


def test_without_an_engine_the_old_policy_tells_the_drift() -> None:
    given = step(GRPOSettings(beta=0.0, off_policy_delta=-99.0))
    old = {"old_logprobs": given.columns["old_logprobs"]}
    out = get_loss("grpo")(replace(given, columns=old))
    assert out.metrics.result()["off_policy_masked"] == pytest.approx(3 / 5), "all rows with A < 0"


def test_entropy_filter() -> None:
    """Only tokens of high entropy get a policy gradient; the KL stays on all, as in TRL and ms-swift."""
    entropy = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0)).to(F64)
    given = step(GRPOSettings(beta=0.1, entropy_filter=True), entropy_threshold=[0.6] * 6)
    given = replace(given, columns={**given.columns, "entropy": entropy})
    bare = get_loss("grpo")(step(GRPOSettings(beta=0.1))).token_loss
    no_kl = get_loss("grpo")(step(GRPOSettings(beta=0.0))).token_loss
    out = get_loss("grpo")(given)
    assert bare is not None
    assert no_kl is not None
    torch.testing.assert_close(out.token_loss, torch.where(entropy >= 0.6, bare, bare - no_kl))
    assert out.metrics.result()["entropy_kept"] == pytest.approx((entropy >= 0.6).double().mean().item())
    assert out.metrics.result()["entropy/threshold"] == 0.6


def test_what_is_missing_is_named() -> None:
    bare = replace(step(GRPOSettings(beta=0.0)), columns={})
    for settings, wanted in (
        (GRPOSettings(beta=0.0, correction=RolloutCorrection("token_mask")), "rollout_logprobs"),
        (GRPOSettings(beta=0.0, entropy_filter=True), "entropy, entropy_threshold"),
        (GRPOSettings(beta=0.1), "ref_logprobs"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            get_loss("grpo")(replace(bare, settings=settings))


# -- invariance and extremes

EVERYTHING: dict[str, Any] = {
    "beta": 0.1,
    "correction": RolloutCorrection("sequence_mask", 1.15, 0.5),
    "off_policy_delta": 0.3,
    "entropy_filter": True,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", GRPOSettings(**EVERYTHING)),
        ("cispo", CISPOSettings(epsilon_high=1.1, **EVERYTHING)),
        ("sapo", SAPOSettings(**EVERYTHING)),
    ],
)
def test_the_cut_into_micro_batches_does_not_matter(
    name: str, settings: PolicySettings, level: Any, cut: list[list[int]]
) -> None:
    given = step(replace(settings, importance_sampling_level=level), entropy_threshold=[0.5] * 6)
    entropy = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1)).to(F64)
    given = replace(given, columns={**given.columns, "entropy": entropy})
    weight = row_weights(LENGTHS, "cispo" if name == "cispo" else "grpo")
    whole = step_result(name, given, weight)
    parts = step_result(name, given, weight, cut=cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)
    assert whole[1].abs().sum() > 0


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30, math.inf])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("grpo", GRPOSettings()), ("cispo", CISPOSettings(epsilon_high=5.0)), ("sapo", SAPOSettings())],
)
def test_extreme_ratios_stay_finite(
    name: str, settings: PolicySettings, sign: int, gap: float, level: Any
) -> None:
    """Among them a row whose tokens are off in both directions, and float32 as in a run."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    far = torch.tensor([-1.0 - sign * gap, -2.0 + sign * gap, -0.5 - sign * gap])
    chosen = replace(
        settings,
        importance_sampling_level=level,
        beta=0.1,
        correction=RolloutCorrection("sequence_truncate"),
        off_policy_delta=0.1,
    )
    for advantage in (-1.0, 0.0, 1.0):
        given = LossInputs(
            logprobs,
            rows_of((2, 1)),
            2,
            chosen,
            {"old_logprobs": far, "ref_logprobs": far, "rollout_logprobs": -far},
            torch.full((3,), advantage),
        )
        out = get_loss(name)(given)
        assert out.token_loss is not None
        (grad,) = torch.autograd.grad(out.token_loss.sum(), logprobs)
        assert torch.isfinite(out.token_loss).all()
        assert torch.isfinite(grad).all()
        assert all(math.isfinite(v) for v in out.metrics.result().values())


def test_everything_masked_is_zero_and_not_nan() -> None:
    """All weights 0 (every completion cut off), no rows at all, and rows without a single token."""
    given = step(GRPOSettings())
    loss, grad, _ = step_result("grpo", given, row_weights([0] * 6, "grpo"))
    assert (loss, grad.abs().sum().item()) == (0.0, 0.0)
    for lengths in ((), (0, 0)):
        none = make_step(
            lengths or (0,), GRPOSettings(importance_sampling_level="sequence"), advantages=[1.0] * 2
        )
        out = get_loss("grpo")(none)
        assert out.token_loss is not None
        assert out.token_loss.sum().item() == 0
        assert torch.isfinite(torch.autograd.grad(out.token_loss.sum(), none.logprobs)[0]).all()


def test_loss_types_come_with_their_normaliser() -> None:
    torch.testing.assert_close(row_weights(LENGTHS, "sapo"), row_weights(LENGTHS, "grpo"))
    torch.testing.assert_close(row_weights(LENGTHS, "cispo"), row_weights(LENGTHS, "dapo"))
