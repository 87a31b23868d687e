"""GMPO, GPG, LUSPO, VESPO, DPPO and KPop against their papers, row by row in Python floats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.losses.cispo import CISPOSettings
from raytune_rl.algorithms.losses.dppo import DPPOSettings, binary_divergence
from raytune_rl.algorithms.losses.gmpo import GMPOSettings
from raytune_rl.algorithms.losses.gpg import GPGSettings
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.kpop import KPopSettings
from raytune_rl.algorithms.losses.vespo import VESPOSettings
from raytune_rl.algorithms.policy_loss import PolicySettings
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.config import RLHFConfig
from raytune_rl.config.parser import parse
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.online_algorithms import algorithm_of, in_words
from tests.algorithms.step import F64, make_step, step_result

LENGTHS = (5, 1, 9, 0, 6, 2)
ADVANTAGES = (1.3, -0.7, -1.1, 2.0, 0.0, -2.0)
SETTINGS: dict[str, Any] = {
    "gmpo": GMPOSettings, "gpg": GPGSettings, "vespo": VESPOSettings,
    "dppo_tv": DPPOSettings, "dppo_kl": DPPOSettings, "kpop": KPopSettings,
}  # fmt: skip


def step(settings: PolicySettings, **more: Any) -> LossInputs:
    return make_step(LENGTHS, settings, advantages=ADVANTAGES, **more)


def rows(inputs: LossInputs, column: Tensor) -> list[list[float]]:
    return [column[inputs.row_of == row].tolist() for row in range(inputs.n_rows)]


def gradient(inputs: LossInputs, name: str) -> tuple[Tensor, Tensor]:
    """Token losses, and the gradient of their sum."""
    loss = get_loss(name)(inputs).token_loss
    assert loss is not None
    (grad,) = torch.autograd.grad(loss.sum(), inputs.logprobs, retain_graph=True)
    return loss.detach(), grad


@pytest.mark.parametrize("name", SETTINGS)
def test_where_the_policy_is_the_one_that_sampled_all_are_the_policy_gradient(name: str) -> None:
    given = step(SETTINGS[name](beta=0.0))
    given = replace(given, columns={"rollout_logprobs": given.logprobs.detach()})
    _, grad, _ = step_result(name, given, torch.ones(6))
    assert given.advantages is not None
    torch.testing.assert_close(grad, -given.advantages, rtol=1e-12, atol=1e-12)


# -- GMPO


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_gmpo_is_the_papers_geometric_mean(epsilon: float) -> None:
    """(prod_t |min(rho A, clip(rho) A)|)^(1/n) sgn(A), divided by nothing; its gradient by differences."""
    given = step(GMPOSettings(beta=0.0, gmpo_epsilon=epsilon), spread=0.6)
    low, high = math.exp(-epsilon), math.exp(epsilon)

    def objective(logprobs: list[list[float]]) -> list[float]:
        found = []
        olds = rows(given, given.columns["old_logprobs"])
        for lps, old, a in zip(logprobs, olds, ADVANTAGES, strict=True):
            if not lps or a == 0:
                found.append(0.0)
                continue
            product = 1.0
            for lp, o in zip(lps, old, strict=True):
                rho = math.exp(lp - o)
                product *= abs(min(rho * a, min(max(rho, low), high) * a))
            found.append(product ** (1 / len(lps)) * math.copysign(1, a))
        return found

    loss, grad = gradient(given, "gmpo")
    plain = rows(given, given.logprobs.detach())
    want = objective(plain)
    for row, of_tokens in enumerate(rows(given, loss)):
        assert of_tokens == pytest.approx([-want[row]] * LENGTHS[row], rel=1e-12)
    weight = torch.from_numpy(row_weights(LENGTHS, "gmpo"))
    total, _, metrics = step_result("gmpo", given, weight)
    assert total == pytest.approx(-sum(want) / 6, rel=1e-12), "the mean over completions"
    for row, t in ((0, 2), (2, 0), (2, 5), (5, 1)):
        shifted = [list(r) for r in plain]
        shifted[row][t] += 1e-6
        slope = -(objective(shifted)[row] - want[row]) / 1e-6 * LENGTHS[row]
        assert rows(given, grad)[row][t] == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert 0 < metrics["gmpo/clip_ratio"] < 1


def test_gmpo_without_a_clip_is_gspo_without_a_clip() -> None:
    wide = step(GMPOSettings(beta=0.0, gmpo_epsilon=100.0))
    gspo = step(GRPOSettings(beta=0.0, epsilon=1.0, epsilon_high=1e9, importance_sampling_level="sequence"))
    for one, other in zip(gradient(wide, "gmpo"), gradient(gspo, "grpo"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


# -- GPG


def test_gpg_is_reinforce_over_all_tokens_of_the_step() -> None:
    given = step(GPGSettings(beta=0.0))
    total, grad, _ = step_result("gpg", given, torch.from_numpy(row_weights(LENGTHS, "gpg")))
    assert given.advantages is not None
    want = sum(-a * sum(lps) for lps, a in zip(rows(given, given.logprobs.detach()), ADVANTAGES, strict=True))
    assert total == pytest.approx(want / sum(LENGTHS), rel=1e-12)
    torch.testing.assert_close(grad, -given.advantages / sum(LENGTHS))


# -- LUSPO


def test_luspo_is_gspo_times_the_length() -> None:
    settings = GRPOSettings(beta=0.0, epsilon=0.003, epsilon_high=0.2, importance_sampling_level="sequence")
    given = step(settings)
    total, grad, _ = step_result("luspo", given, torch.from_numpy(row_weights(LENGTHS, "luspo")))
    want = 0.0
    olds = rows(given, given.columns["old_logprobs"])
    for lps, old, a in zip(rows(given, given.logprobs.detach()), olds, ADVANTAGES, strict=True):
        if lps:
            s = math.exp((sum(lps) - sum(old)) / len(lps))
            want -= len(lps) * min(s * a, min(max(s, 0.997), 1.2) * a) / 6
    assert total == pytest.approx(want, rel=1e-12)
    _, gspo, _ = step_result("grpo", step(settings), torch.from_numpy(row_weights(LENGTHS, "grpo")))
    by_length = torch.tensor(LENGTHS, dtype=F64)[given.row_of]
    torch.testing.assert_close(grad, gspo * by_length, rtol=1e-12, atol=1e-15)


def test_luspo_is_of_the_sequence_whatever_the_flag() -> None:
    base = ["--model", "m", "--dataset", "d", "--reward_funcs", "accuracy", "--loss_type", "luspo"]
    quiet = parse(base, RLHFConfig, environ={})
    assert quiet.notices == ()
    algorithm = algorithm_of(quiet.config)
    assert algorithm.loss.settings["importance_sampling_level"] == "sequence"
    assert dict(in_words(quiet.config, algorithm))["importance ratio"] == "of the sequence"
    (said,) = parse([*base, "--importance_sampling_level", "token"], RLHFConfig, environ={}).notices
    assert said.startswith("--importance_sampling_level does nothing: --loss_type luspo does not read it")


# -- VESPO


@pytest.mark.parametrize("spread", [0.05, 0.5, 4.0])
def test_vespo_is_the_kernel_of_the_whole_ratio(spread: float) -> None:
    given = step(VESPOSettings(beta=0.0, vespo_k_neg=2.5, vespo_lambda_pos=1.5), spread=spread)
    loss, grad = gradient(given, "vespo")
    olds = rows(given, given.columns["old_logprobs"])
    for row, (lps, old, a) in enumerate(
        zip(rows(given, given.logprobs.detach()), olds, ADVANTAGES, strict=True)
    ):
        total = sum(min(max(lp - o, -20), 20) for lp, o in zip(lps, old, strict=True))
        log_w = min(max(total, math.log(1e-8)), 20)
        k, decay = (2.0, 1.5) if a >= 0 else (2.5, 2.0)
        phi = math.exp(decay + k * log_w - decay * math.exp(log_w))
        assert rows(given, loss)[row] == pytest.approx([-phi * a * lp for lp in lps], rel=1e-10, abs=1e-300)
        assert rows(given, grad)[row] == pytest.approx([-phi * a] * len(lps), rel=1e-10, abs=1e-300)


def test_vespo_without_a_kernel_is_the_policy_gradient_and_bad_settings_are_refused() -> None:
    flat = {f"vespo_{what}_{side}": 0.0 for what in ("k", "lambda") for side in ("pos", "neg")}
    one = gradient(step(VESPOSettings(beta=0.0, **flat)), "vespo")  # type: ignore[arg-type]
    other = gradient(step(GPGSettings(beta=0.0)), "gpg")
    torch.testing.assert_close(one, other)
    for name in flat:
        with pytest.raises(ConfigError, match=name):
            VESPOSettings(**{name: -1.0})  # type: ignore[arg-type]


# -- DPPO


def divergence_by_hand(kind: str, now: float, then: float) -> float:
    if kind == "tv":
        return abs(now - then)
    return then * math.log(then / now) + (1 - then) * math.log((1 - then) / (1 - now))


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_dppo_masks_what_moves_further_away(kind: str) -> None:
    """By the engine's probabilities, not by those that the trainer worked out anew."""
    settings = DPPOSettings(beta=0.0, dppo_threshold=0.1 if kind == "tv" else 0.02, dppo_cap=1.2)
    given = step(settings, spread=0.4)
    engine = given.columns["rollout_logprobs"].clamp(max=-0.01)
    engine[3] = math.nan
    given = replace(given, columns={**given.columns, "rollout_logprobs": engine})
    loss, grad = gradient(given, f"dppo_{kind}")
    metrics = get_loss(f"dppo_{kind}")(given).metrics.result()
    masked = capped = 0
    assert given.advantages is not None
    for at in range(sum(LENGTHS)):
        lp, a = given.logprobs[at].item(), given.advantages[at].item()
        mu = (given.columns["old_logprobs"] if at == 3 else engine)[at].item()
        distance = divergence_by_hand(kind, math.exp(lp), math.exp(mu))
        assert settings.dppo_threshold is not None
        out = distance > settings.dppo_threshold and ((a > 0 and lp > mu) or (a <= 0 and lp < mu))
        weight = 0.0 if out else min(math.exp(lp - mu), 1.2)
        assert loss[at].item() == pytest.approx(-weight * a * lp, rel=1e-12)
        assert grad[at].item() == pytest.approx(-weight * a, rel=1e-12)
        masked += out
        capped += math.exp(lp - mu) > 1.2
    assert 0 < masked < sum(LENGTHS)
    assert metrics["dppo/masked"] == pytest.approx(masked / sum(LENGTHS))
    assert metrics["dppo/capped"] == pytest.approx(capped / sum(LENGTHS))


def test_dppo_without_a_mask_is_cispo() -> None:
    given = step(DPPOSettings(beta=0.0, dppo_threshold=1e9, dppo_cap=1.3))
    given = replace(given, columns={**given.columns, "rollout_logprobs": given.columns["old_logprobs"]})
    cispo = step(CISPOSettings(beta=0.0, epsilon_high=1.3))
    torch.testing.assert_close(gradient(given, "dppo_kl"), gradient(cispo, "cispo"))


def test_a_rare_token_may_change_by_a_factor_and_a_likely_one_may_not() -> None:
    """What the paper is about: 1e-6 to 3e-6 is a ratio of 3 and no distance; 0.4 to 0.6 is one of 1.5."""
    then = torch.tensor([1e-6, 0.4], dtype=F64).log()
    now = torch.tensor([3e-6, 0.6], dtype=F64).log()
    for kind in ("tv", "kl"):
        rare, likely = binary_divergence(now, then, kind).tolist()
        assert rare < 1e-5 < 0.05 < likely
    certain = torch.tensor([0.0, -1e6], dtype=F64)
    for other in (certain, certain.flip(0)):
        assert torch.isfinite(binary_divergence(certain, other, "kl")).all()


def test_dppo_refuses_what_it_does_itself() -> None:
    with pytest.raises(ConfigError, match="weigh tokens by their ratio to the engine already"):
        DPPOSettings(correction=RolloutCorrection("token_truncate"))
    for bad in ({"dppo_threshold": -1.0}, {"dppo_cap": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            DPPOSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gmpo_epsilon"):
        GMPOSettings(gmpo_epsilon=0.0)
    assert get_loss("dppo_kl").required_columns(DPPOSettings(beta=0.1)) == (
        "ref_logprobs",
        "rollout_logprobs",
    )


@pytest.mark.parametrize("tau", [0.0, 0.01])
def test_kpop_masks_what_is_far_either_way(tau: float) -> None:
    """Whatever the sign of the advantage; the squared log ratio is there for every token."""
    given = step(KPopSettings(beta=0.0, kpop_threshold=0.02, kpop_tau=tau), spread=0.4)
    engine = given.columns["rollout_logprobs"].clamp(max=-0.01)
    engine[3] = math.nan
    given = replace(given, columns={**given.columns, "rollout_logprobs": engine})
    loss, grad = gradient(given, "kpop")
    metrics = get_loss("kpop")(given).metrics.result()
    masked, apart = 0, 0.0
    assert given.advantages is not None
    for at in range(sum(LENGTHS)):
        lp, a = given.logprobs[at].item(), given.advantages[at].item()
        mu = (given.columns["old_logprobs"] if at == 3 else engine)[at].item()
        p, q = math.exp(lp), math.exp(mu)
        far = max(divergence_by_hand("kl", p, q), divergence_by_hand("kl", q, p))
        weight = 0.0 if far > 0.02 else p / q
        assert loss[at].item() == pytest.approx(-weight * a * lp + tau * (lp - mu) ** 2, rel=1e-12)
        assert grad[at].item() == pytest.approx(-weight * a + 2 * tau * (lp - mu), rel=1e-12)
        masked += far > 0.02
        apart += far
    assert 0 < masked < sum(LENGTHS)
    assert metrics["kpop/masked"] == pytest.approx(masked / sum(LENGTHS))
    assert metrics["kpop/divergence"] == pytest.approx(apart / sum(LENGTHS))
    with pytest.raises(ConfigError, match="kpop weighs tokens by their ratio to the engine"):
        KPopSettings(correction=RolloutCorrection("token_truncate"))
