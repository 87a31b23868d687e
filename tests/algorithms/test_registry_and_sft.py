"""The registry, the SFT loss, and metric sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from raytune_rl.algorithms import registry
from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.sft import SFTSettings
from raytune_rl.algorithms.metrics import (
    MetricSums,
    Stat,
    ess_of,
    max_of,
    mean_of,
    merge_all,
    min_of,
    total_of,
)
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, get_loss, loss_names, register_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import make_step, step_result


def test_sft_is_nll_and_accuracy() -> None:
    logprobs = torch.tensor([-0.5, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    given = LossInputs(
        logprobs, torch.tensor([0, 0, 1]), 2, SFTSettings(), correct=torch.tensor([True, False, True])
    )
    out = get_loss("sft")(given)
    assert out.token_loss.tolist() == [0.5, 1.0, 3.0]
    (grad,) = torch.autograd.grad(out.token_loss.sum(), logprobs)
    assert grad.tolist() == [-1, -1, -1]
    assert out.metrics.result() == pytest.approx({"nll": 1.5, "token_acc": 2 / 3})


def test_dft_weighs_a_token_by_its_probability() -> None:
    """Wu et al. 2025, eq. 9: -sg(p) log p, so the gradient in log p is -p; held-out rows by likelihood."""
    logprobs = torch.tensor([-0.5, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    given = LossInputs(logprobs, torch.tensor([0, 0, 1]), 2, SFTSettings(enable_dft_loss=True))
    out = get_loss("sft")(given)
    assert out.token_loss is not None
    p = [math.exp(x) for x in (-0.5, -1.0, -3.0)]
    assert out.token_loss.tolist() == pytest.approx([0.5 * p[0], 1.0 * p[1], 3.0 * p[2]], rel=1e-14)
    (grad,) = torch.autograd.grad(out.token_loss.sum(), logprobs)
    assert grad.tolist() == pytest.approx([-x for x in p], rel=1e-14)
    assert out.metrics.result()["nll"] == pytest.approx(1.5), "the likelihood, whatever is trained"
    held_out = get_loss("sft")(replace(given, logprobs=logprobs.detach())).token_loss
    assert held_out is not None
    assert held_out.tolist() == [0.5, 1.0, 3.0]
    certain = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sure, plain = (
        torch.autograd.grad(
            get_loss("sft")(replace(given, logprobs=certain, settings=s)).token_loss.sum(), certain
        )
        for s in (SFTSettings(enable_dft_loss=True), SFTSettings())
    )
    torch.testing.assert_close(sure, plain, msg="of what is certain it is plain SFT")


@pytest.mark.parametrize("dft", [False, True])
def test_channels_are_measured_apart_whatever_the_cut(dft: bool) -> None:
    given = make_step((2, 3, 1, 2), SFTSettings(enable_dft_loss=dft))
    members = {"channel:math": [1, 0, 1, 0], "channel:a/b": [0, 1, 0, 0]}
    given = replace(given, row_values={n: torch.tensor(v, dtype=torch.float64) for n, v in members.items()})
    weights = row_weights((2, 3, 1, 2), "sft")
    loss, grad, metrics = step_result("sft", given, weights)
    of_token = [-x * (math.exp(x) if dft else 1) for x in given.logprobs.tolist()]
    assert metrics["loss_math"] == pytest.approx((sum(of_token[:2]) + of_token[5]) / 3)
    assert metrics["loss_a/b"] == pytest.approx(sum(of_token[2:5]) / 3)
    assert loss == pytest.approx(sum(of_token) / 8)
    for cut in ([[0], [1], [2], [3]], [[3, 1], [], [2, 0]]):
        again = step_result("sft", given, weights, cut=cut)
        assert again[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(again[1], grad)
        assert again[2] == pytest.approx(metrics)


def test_names_and_unknown_name() -> None:
    assert {"grpo", "sft"} <= set(loss_names())
    with pytest.raises(ConfigError, match=r"'ppo2'.*grpo, .*sft"):
        get_loss("ppo2")


def test_a_new_loss_needs_only_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))

    @dataclass(frozen=True)
    class Mine:
        weight: float = 2.0

    def compute(inputs: LossInputs) -> LossOutput:
        return LossOutput(-inputs.settings.weight * inputs.columns["extra"], MetricSums())

    register_loss(Loss("mine", Mine, compute, lambda settings: ("extra",)))
    given = LossInputs(torch.zeros(1), torch.zeros(1, dtype=torch.long), 1, Mine(), {"extra": torch.ones(1)})
    assert get_loss("mine")(given).token_loss.tolist() == [-2.0]
    with pytest.raises(ConfigError, match="already registered"):
        register_loss(Loss("mine", Mine, compute))
    with pytest.raises(ConfigError, match="takes SFTSettings, got Mine"):
        get_loss("sft")(given)


def test_columns_follow_the_settings() -> None:
    grpo = get_loss("grpo")
    assert grpo.required_columns(GRPOSettings(beta=0.1)) == ("ref_logprobs",)
    assert grpo.required_columns(GRPOSettings(beta=0.0)) == ()


def test_metric_sums_merge_in_any_order() -> None:
    data = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0, 9.0])

    def measure(x: torch.Tensor) -> MetricSums:
        return MetricSums({"a": mean_of(x), "b": max_of(x), "c": min_of(x), "d": total_of(x)})

    parts = [measure(data[:1]), measure(data[1:1]), measure(data[1:4]).host(), measure(data[4:])]
    want = {"a": 3.5, "b": 9.0, "c": -1.0, "d": 21.0}
    assert merge_all(parts).result() == want
    assert merge_all(reversed(parts)).result() == want
    assert parts[0].merge(parts[1].merge(parts[2], parts[3])).result() == want
    host = merge_all(parts).host()
    assert all(isinstance(stat.value, float) for stat in host.stats.values())


def test_nothing_measured_is_left_out_and_nan_is_not() -> None:
    empty = torch.zeros(0)
    sums = MetricSums({"mean": mean_of(empty), "max": max_of(empty), "count": total_of(empty)})
    assert sums.result() == {"count": 0.0}
    for first, second in ((1.0, math.nan), (math.nan, 1.0)):
        assert math.isnan(Stat("max", first, 1).merge(Stat("max", second, 1)).result())
        assert math.isnan(Stat("min", first, 1).merge(Stat("min", second, 1)).result())
    with pytest.raises(ValueError, match="cannot merge"):
        Stat("max", 1.0, 1).merge(Stat("mean", 1.0, 1))


def test_metrics_hold_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    for stat in (mean_of(x * 2), max_of(x * 2), min_of(x * 2), total_of(x * 2)):
        assert isinstance(stat.value, torch.Tensor)
        assert not stat.value.requires_grad


def test_total_adds_token_and_row_losses_each_with_its_weights() -> None:
    token = torch.tensor([1.0, 2.0], requires_grad=True)
    row = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    output = LossOutput(token, MetricSums(), row)
    total = output.total(torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.0, 0.1], dtype=torch.float64))
    assert total.item() == pytest.approx(0.5 + 0.5 + 3.0 + 0.7)
    assert total.dtype == torch.float32, "what DeepSpeed scales and sends backward"
    total.backward()
    assert token.grad is not None
    assert row.grad is not None
    assert token.grad.tolist() == [0.5, 0.25]
    assert row.grad.tolist() == pytest.approx([1.0, 0.0, 0.1])
    assert LossOutput(token, MetricSums()).total(torch.ones(2), None).item() == 3.0
    assert LossOutput(None, MetricSums(), row).total(None, torch.ones(3)).item() == 15.0


def test_total_says_what_is_missing() -> None:
    one = torch.ones(1)
    for output, message in (
        (LossOutput(one, MetricSums()), "'weight'"),
        (LossOutput(None, MetricSums(), one), "'row_weight'"),
        (LossOutput(None, MetricSums()), "token_loss, row_loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            output.total(None, None)


def test_losses_say_how_their_rows_belong_together() -> None:
    pairs = {name for name in loss_names() if get_loss(name).rows == "pairs" and get_loss(name).is_built_in}
    assert pairs == {"dpo", "orpo", "cpo", "rm"}
    assert {name: get_loss(name).forward for name in ("rm", "ppo_value", "kto")} == {
        "rm": "scores",
        "ppo_value": "values",
        "kto": "logprobs",
    }


def test_effective_sample_size_merges_exactly() -> None:
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    parts = [MetricSums({"ess": ess_of(w)}) for w in (weights[:1], weights[1:1], weights[1:])]
    want = weights.sum() ** 2 / (5 * (weights**2).sum())
    assert merge_all(p.host() for p in parts).result()["ess"] == pytest.approx(want.item())
    assert merge_all(parts).result()["ess"] == pytest.approx(want.item())
    assert ess_of(torch.zeros(3)).result() == 0.0
    assert MetricSums({"ess": ess_of(torch.zeros(0))}).result() == {}
