"""The GRPO token loss in float64 against formulas written here, branch by branch, and their hand-made
gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raytune_rl.algorithms.kl import k1, k2, k3
from raytune_rl.algorithms.losses.grpo import GRPOSettings, clipped_surrogate
from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.registry import LossInputs, LossOutput, get_loss
from raytune_rl.errors import ConfigError

LENGTHS = (5, 1, 9, 0, 6)
N = sum(LENGTHS)
ROW_OF = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def inputs(settings: GRPOSettings, spread: float = 0.5) -> LossInputs:
    generator = torch.Generator().manual_seed(4)
    logprobs = -torch.rand(N, generator=generator, dtype=torch.float64) * 3
    columns = {
        "old_logprobs": logprobs + spread * torch.randn(N, generator=generator, dtype=torch.float64),
        "ref_logprobs": logprobs + spread * torch.randn(N, generator=generator, dtype=torch.float64),
    }
    per_row = torch.tensor([1.3, -0.7, -1.1, 2.0, 0.0], dtype=torch.float64)
    return LossInputs(logprobs.requires_grad_(), ROW_OF, len(LENGTHS), settings, columns, per_row[ROW_OF])


def by_hand(given: LossInputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient per token, case by case in Python floats."""
    s: GRPOSettings = given.settings
    loss, slope = [], []
    assert given.advantages is not None
    for at in range(N):
        lp, a = given.logprobs[at].item(), given.advantages[at].item()
        rho = math.exp(lp - given.columns["old_logprobs"][at].item())
        capped = rho if s.delta is None or rho <= s.delta else s.delta
        low, high = 1 - s.epsilon, 1 + (s.epsilon if s.epsilon_high is None else s.epsilon_high)
        clipped = min(max(rho, low), high)
        if capped * a <= clipped * a:
            value, grad = -capped * a, (-rho * a if capped == rho else 0.0)
        else:
            value, grad = -clipped * a, 0.0
        if s.beta:
            d = given.columns["ref_logprobs"][at].item() - lp
            value += s.beta * (math.exp(d) - d - 1)
            grad += s.beta * (1 - math.exp(d))
        loss.append(value)
        slope.append(grad)
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        GRPOSettings(beta=0.0),
        GRPOSettings(beta=0.04),
        GRPOSettings(epsilon=0.1, epsilon_high=0.4, beta=0.3),
        GRPOSettings(delta=1.5, beta=0.0),
        GRPOSettings(epsilon=0.05, delta=1.2, beta=1.0),
    ],
    ids=str,
)
def test_value_and_gradient(settings: GRPOSettings) -> None:
    given = inputs(settings)
    out = get_loss("grpo")(given)
    want, slope = by_hand(given)
    torch.testing.assert_close(out.token_loss, want, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-12)
    # The clip binds somewhere, but not everywhere.
    assert 0 < out.metrics.result()["clip_ratio/region_mean"] < 0.9


def test_on_policy_gradient_is_minus_advantage() -> None:
    given = replace(inputs(GRPOSettings(beta=0.0)), columns={})
    out = get_loss("grpo")(given)
    assert given.advantages is not None
    torch.testing.assert_close(out.token_loss, -given.advantages)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    torch.testing.assert_close(grad, -given.advantages)


def test_equal_rewards_and_no_kl_give_no_gradient() -> None:
    given = inputs(GRPOSettings(beta=0.0))
    given = replace(given, advantages=torch.zeros(N, dtype=torch.float64))
    (grad,) = torch.autograd.grad(get_loss("grpo")(given).token_loss.sum(), given.logprobs)
    assert grad.abs().sum() == 0


def test_kl_to_itself_is_zero() -> None:
    given = inputs(GRPOSettings(beta=5.0))
    given = replace(
        given,
        columns={"ref_logprobs": given.logprobs.detach()},
        advantages=torch.zeros(N, dtype=torch.float64),
    )
    out = get_loss("grpo")(given)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), given.logprobs)
    assert out.token_loss.abs().sum() == 0
    assert grad.abs().sum() == 0
    assert out.metrics.result()["kl"] == 0


def test_beta_zero_never_looks_at_a_reference() -> None:
    given = inputs(GRPOSettings(beta=0.0))
    out = get_loss("grpo")(replace(given, columns={"old_logprobs": given.columns["old_logprobs"]}))
    assert torch.equal(out.token_loss, get_loss("grpo")(given).token_loss)
    assert "kl" not in out.metrics.stats


@pytest.mark.parametrize("gap", [50.0, 500.0, 1e30, float("inf")])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_ratios_stay_finite(gap: float, advantage: float, sign: int) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    old = torch.tensor([-1.0 - sign * gap])
    given = LossInputs(
        logprobs,
        torch.tensor([0]),
        1,
        GRPOSettings(beta=0.1),
        {"old_logprobs": old, "ref_logprobs": old},
        torch.tensor([advantage]),
    )
    out = get_loss("grpo")(given)
    out.token_loss.sum().backward()
    assert torch.isfinite(out.token_loss).all()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(v) for v in out.metrics.result().values())


def test_a_nan_is_not_hidden() -> None:
    given = inputs(GRPOSettings(beta=0.0))
    broken = given.logprobs.detach().clone()
    broken[2] = float("nan")
    out = get_loss("grpo")(replace(given, logprobs=broken))
    assert out.token_loss.isnan().tolist() == [i == 2 for i in range(N)]


def test_no_tokens() -> None:
    empty = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    given = LossInputs(
        empty, torch.zeros(0, dtype=torch.long), 1, GRPOSettings(), {"ref_logprobs": none}, none, entropy=none
    )
    out = get_loss("grpo")(given)
    out.token_loss.sum().backward()
    assert empty.grad is not None
    assert out.metrics.result() == {}
    # and merging it changes nothing
    full = get_loss("grpo")(inputs(GRPOSettings())).metrics
    assert full.merge(out.metrics).result() == full.result()


def test_clip_ratios_count_binding_clips_only() -> None:
    rho = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0, 0.7], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -2.0], dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    _, metrics = clipped_surrogate(rho, advantages, rows, 2)
    result = metrics.result()
    assert result["clip_ratio/low_mean"] == pytest.approx(2 / 6)  # tokens 1 and 5
    assert result["clip_ratio/high_mean"] == pytest.approx(1 / 6)  # token 2
    assert result["clip_ratio/region_mean"] == pytest.approx(3 / 6)
    assert result["clip_ratio/low_min"] == pytest.approx(1 / 3)
    assert result["clip_ratio/high_max"] == pytest.approx(1 / 3)


def test_entropy_is_per_completion() -> None:
    given = inputs(GRPOSettings(beta=0.0))
    entropy = torch.arange(N, dtype=torch.float64)
    result = get_loss("grpo")(replace(given, entropy=entropy)).metrics.result()
    means = [entropy[row == ROW_OF].mean().item() for row in range(len(LENGTHS)) if LENGTHS[row]]
    assert result["entropy/mean"] == pytest.approx(sum(means) / len(means))
    assert result["entropy/max"] == pytest.approx(max(means))
    assert result["entropy/min"] == pytest.approx(min(means))


def part(given: LossInputs, rows: list[int]) -> LossOutput:
    pick = torch.cat([torch.nonzero(given.row_of == row).flatten() for row in rows])
    local = torch.tensor([rows.index(int(r)) for r in given.row_of[pick]], dtype=torch.long)
    assert given.advantages is not None
    assert given.entropy is not None
    return get_loss("grpo")(
        replace(
            given,
            logprobs=given.logprobs[pick],
            row_of=local,
            n_rows=len(rows),
            columns={n: c[pick] for n, c in given.columns.items()},
            advantages=given.advantages[pick],
            entropy=given.entropy[pick],
        )
    )


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[4, 0], [2, 3, 1]], [[3], [2, 4, 1, 0]]])
def test_metrics_do_not_depend_on_the_split(split: list[list[int]]) -> None:
    given = replace(inputs(GRPOSettings()), entropy=torch.rand(N, dtype=torch.float64))
    whole = get_loss("grpo")(given).metrics.result()
    merged = MetricSums().merge(*(part(given, rows).metrics.host() for rows in split)).result()
    assert merged == pytest.approx(whole, rel=1e-12)
    assert whole["clip_ratio/region_mean"] > 0
    assert whole["kl"] > 0


def test_missing_inputs_are_named() -> None:
    given = inputs(GRPOSettings(beta=0.1))
    with pytest.raises(ConfigError, match="ref_logprobs"):
        get_loss("grpo")(replace(given, columns={}))
    with pytest.raises(ConfigError, match="advantages"):
        get_loss("grpo")(replace(given, advantages=None))


@pytest.mark.parametrize(
    "bad", [{"epsilon": -0.1}, {"epsilon": 1.5}, {"epsilon_high": -1.0}, {"delta": 0.0}, {"beta": -0.04}]
)
def test_impossible_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GRPOSettings(**bad)  # type: ignore[arg-type]


def test_kl_estimators_agree_on_the_true_kl() -> None:
    """Weighted by the policy's own probabilities, k1 and k3 give the KL exactly; k2 is close when it is
    small."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    assert (p * k1(p.log(), q.log())).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (p * k2(p.log(), q.log())).sum().item() == pytest.approx(exact, rel=0.1)
    assert (k3(p.log(), q.log()) >= 0).all()
    assert (k1(p.log(), q.log()) < 0).any()


def test_k3_clamps() -> None:
    logprobs = torch.tensor([-30.0, 0.0], requires_grad=True)
    value = k3(logprobs, torch.tensor([0.0, -30.0]))
    # Above: e^20 - 21 capped at 10. Below: d = -20, so e^-20 + 20 - 1 is capped at 10 as well.
    assert value.tolist() == [10.0, 10.0]
    value.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]
