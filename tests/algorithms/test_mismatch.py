"""Trainer/rollout gap metrics against row-by-row sums in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_rl.algorithms.metrics import merge_all
from raytune_rl.algorithms.mismatch import rollout_mismatch

TRAIN = [[-1.0, -0.5, -2.0], [], [-0.1], [-3.0, -0.2]]
ROLLOUT = [[-1.1, -0.4, -2.5], [], [-0.1], [-2.0, -0.3]]


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def row_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.long)


def measure(train: list[list[float]], rollout: list[list[float]]) -> dict[str, float]:
    sums = rollout_mismatch(flat(train), flat(rollout), row_of(train), len(train))
    return {name.removeprefix("rollout_correction/"): value for name, value in sums.result().items()}


def test_closed_forms() -> None:
    got = measure(TRAIN, ROLLOUT)
    delta = [t - r for a, b in zip(TRAIN, ROLLOUT, strict=True) for t, r in zip(a, b, strict=True)]
    pairs = [(sum(a) / len(a), sum(b) / len(b), len(a)) for a, b in zip(TRAIN, ROLLOUT, strict=True) if a]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    want = {
        "kl": -mean(delta),
        "k3_kl": mean([math.exp(d) - d - 1 for d in delta]),
        "chi2_token": mean([math.exp(d) ** 2 for d in delta]) - 1,
        "logp_abs_diff_mean": mean([abs(d) for d in delta]),
        "logp_abs_diff_max": 1.0,
        "training_ppl": mean([math.exp(-t) for t, _, _ in pairs]),
        "rollout_ppl": mean([math.exp(-r) for _, r, _ in pairs]),
        "training_log_ppl": mean([-t for t, _, _ in pairs]),
        "rollout_log_ppl": mean([-r for _, r, _ in pairs]),
        "log_ppl_diff": mean([r - t for t, r, _ in pairs]),
        "log_ppl_abs_diff": mean([abs(r - t) for t, r, _ in pairs]),
        "log_ppl_diff_max": max(r - t for t, r, _ in pairs),
        "log_ppl_diff_min": min(r - t for t, r, _ in pairs),
        "ppl_ratio": mean([math.exp(-t) / math.exp(-r) for t, r, _ in pairs]),
        "chi2_seq": mean([math.exp(2 * (t - r)) for t, r, _ in pairs]) - 1,
        "unscored_tokens": 0.0,
    }
    assert got == pytest.approx(want, rel=1e-9)


def test_signs() -> None:
    """A trainer that finds the tokens less likely than the engine: positive KL, higher perplexity."""
    got = measure([[-2.0, -2.0]], [[-1.0, -1.0]])
    assert got["kl"] == pytest.approx(1)
    assert got["log_ppl_diff"] == pytest.approx(1)
    assert got["ppl_ratio"] == pytest.approx(math.e)
    assert got["training_ppl"] > got["rollout_ppl"]


def test_equal_logprobs_give_zeros() -> None:
    got = measure(TRAIN, TRAIN)
    for name in (
        "kl",
        "k3_kl",
        "chi2_token",
        "chi2_seq",
        "log_ppl_diff",
        "log_ppl_abs_diff",
        "logp_abs_diff_max",
    ):
        assert got[name] == 0, name
    assert got["ppl_ratio"] == 1


def test_split_does_not_matter() -> None:
    parts = [
        rollout_mismatch(flat(TRAIN[a:b]), flat(ROLLOUT[a:b]), row_of(TRAIN[a:b]), b - a)
        for a, b in ((0, 1), (1, 2), (2, 4))
    ]
    got = {n.removeprefix("rollout_correction/"): v for n, v in merge_all(parts).result().items()}
    assert got == pytest.approx(measure(TRAIN, ROLLOUT), rel=1e-12)


def test_unscored_tokens_are_left_out_and_counted() -> None:
    got = measure([[-1.0, -9.0], [-7.0]], [[-1.5, math.nan], [-math.inf]])
    assert got["unscored_tokens"] == 2
    assert got["logp_abs_diff_max"] == pytest.approx(0.5)
    assert got["training_ppl"] == pytest.approx(math.e)


def test_a_broken_trainer_is_seen() -> None:
    got = measure([[-1.0, math.nan]], [[-1.0, -1.0]])
    assert math.isnan(got["kl"])
    assert math.isnan(got["logp_abs_diff_max"])


def test_extremes_are_finite() -> None:
    got = measure([[-1e4, -1.0]], [[-1.0, -1e4]])
    assert all(math.isfinite(value) for value in got.values())
    assert got["logp_abs_diff_max"] == pytest.approx(9999)


def test_no_tokens() -> None:
    assert measure([[]], [[]]) == {"unscored_tokens": 0.0}
