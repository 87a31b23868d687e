"""Credits against formulas that are written out here, in Python floats and by enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import numpy as np
import pytest

from raytune_rl.algorithms.advantages import group_advantages
from raytune_rl.algorithms.credit.base import Credit, credit_names, get_credit
from raytune_rl.algorithms.credit.gpg import gpg_advantages
from raytune_rl.algorithms.credit.maxrl import maxrl_advantages
from raytune_rl.algorithms.credit.opo import opo_advantages
from raytune_rl.algorithms.credit.otb import otb_advantages
from raytune_rl.algorithms.credit.pass_at_k import PassAtK, pass_at_k_advantages, pass_at_k_of
from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError, RewardError
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.protocol.rows import RowBatch, TrainBatch
from raytune_rl.workers import row_stats
from tests.algorithms.test_experience import experience

NAN = float("nan")
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
LENGTHS = [3, 5, 2, 7, 4, 4, 9, 1]
NEW = ("opo", "maxrl", "gpg", "pass_at_k", "lite_ppo", "reinforce_plus_plus_baseline")
PASS: dict[str, dict[str, Any]] = {**{name: {} for name in NEW}, "pass_at_k": {"pass_k": 2}}


def credit(name: str, **flags: Any) -> Credit:
    """As a run sets it up."""
    given = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "beta": 0.0}
    return algorithm_of(RLHFConfig(**{**given, "advantage_estimator": name, **flags})).credit


def assigned(name: str, *groups: list[float], **flags: Any) -> tuple[np.ndarray, dict[str, float]]:
    found = experience(*groups)
    batch = cast(TrainBatch, "the batch as it was")
    credited = credit(name, **flags).assign(found, batch, cast(Any, None))
    assert credited.batch is batch
    return credited.advantages, dict(credited.metrics)


# -- OPO


def test_opo_is_the_papers_baseline() -> None:
    found = opo_advantages(REWARDS, LENGTHS, GROUPS)
    want = []
    for group in (0, 1):
        of = [i for i, g in enumerate(GROUPS) if g == group]
        base = sum(LENGTHS[i] * REWARDS[i] for i in of) / sum(LENGTHS[i] for i in of)
        want += [REWARDS[i] - base for i in of]
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_opo_has_the_least_variance_where_a_gradient_grows_with_length() -> None:
    """The variance of sum_i (r_i - b) g_i for independent scores with E g_i^2 = l_i is least at OPO's b."""

    def variance(base: float) -> float:
        return sum(n * (r - base) ** 2 for r, n in zip(REWARDS[:4], LENGTHS[:4], strict=True))

    base = REWARDS[0] - float(opo_advantages(REWARDS[:4], LENGTHS[:4], [0] * 4)[0])
    assert variance(base) < min(variance(base - 0.01), variance(base + 0.01))


def test_opo_of_equal_lengths_is_grpo_without_scale() -> None:
    plain = group_advantages(REWARDS, GROUPS, "none").advantages
    np.testing.assert_allclose(opo_advantages(REWARDS, [6] * 8, GROUPS), plain, rtol=1e-6)
    np.testing.assert_allclose(opo_advantages(REWARDS, [0] * 8, GROUPS), plain, rtol=1e-6)
    earned, _ = assigned("opo", REWARDS[:4], REWARDS[4:])
    np.testing.assert_allclose(earned, plain, rtol=1e-6)


# -- MaxRL


def test_maxrl_is_the_mean_score_of_the_successes_less_that_of_all() -> None:
    """Paper, the estimator with its baseline: (1 / K) sum over successes of S - (1 / N) sum of all S."""
    found = maxrl_advantages(REWARDS, GROUPS).astype(float)
    scores = np.random.default_rng(0).normal(size=8)
    for group, rows in ((0, slice(0, 4)), (1, slice(4, 8))):
        reward, score = np.array(REWARDS[rows]), scores[rows]
        want = score[reward == 1].mean() - score.mean()
        assert float(found[rows] @ score) / 4 == pytest.approx(want, rel=1e-6), group


def test_maxrl_follows_the_gradient_of_the_truncated_log_likelihood() -> None:
    """E of the estimator over all 2^N outcomes is the gradient of -sum_k<N (1 - p)^k / k, for a coin:
    the term k = N would be that of the baseline in groups without a success, which earn nothing."""
    p, n = 0.3, 4
    expected = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        probability = math.prod(p if r else 1 - p for r in outcome)
        scores = [1 / p if r else -1 / (1 - p) for r in outcome]  # d log prob / d p
        earned = maxrl_advantages(outcome, [0] * n)
        expected += probability * sum(a * s for a, s in zip(earned.tolist(), scores, strict=True)) / n
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, n)), rel=1e-6)


def test_maxrl_weighs_a_rare_success_more_than_grpo_and_refuses_negative_rewards() -> None:
    assert maxrl_advantages([1.0, 0, 0, 0, 0, 0, 0, 0], [0] * 8)[0] == pytest.approx(7.0)
    assert not maxrl_advantages([0.0] * 4, [0] * 4).any()
    with pytest.raises(RewardError, match=r"-0\.5"):
        maxrl_advantages([1.0, -0.5, NAN], [0, 0, 0])


# -- GPG


def test_gpg_makes_up_for_groups_without_a_signal() -> None:
    rewards, groups = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2]
    found, alpha = gpg_advantages(rewards, groups)
    assert alpha == 3.0
    np.testing.assert_allclose(found, [1.5, -1.5, 0, 0, 0, 0])
    assert gpg_advantages([1.0, 1.0], [0, 0])[1] == 1.0
    full, one = gpg_advantages(REWARDS, GROUPS)
    assert one == 1.0
    np.testing.assert_array_equal(full, group_advantages(REWARDS, GROUPS, "none").advantages)
    assert assigned("gpg", rewards[:2], rewards[2:4], rewards[4:])[1]["gpg/alpha"] == 3.0


# -- pass@k


def by_enumeration(rewards: list[float], k: int) -> list[float]:
    """Every set of k as one sample, its reward the best of its completions; each completion the mean of the
    advantages of its sets."""
    sets = list(itertools.combinations(range(len(rewards)), k))
    best = [max(rewards[i] for i in one) for one in sets]
    mean = sum(best) / len(best)
    spread = math.sqrt(sum((b - mean) ** 2 for b in best) / len(best))
    if spread < 1e-12:
        return [0.0] * len(rewards)
    earned: list[list[float]] = [[] for _ in rewards]
    for one, b in zip(sets, best, strict=True):
        for i in one:
            earned[i].append((b - mean) / spread)
    return [sum(e) / len(e) for e in earned]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("right", range(7))
def test_pass_at_k_is_the_mean_over_all_sets(k: int, right: int) -> None:
    rewards = [1.0] * right + [0.0] * (6 - right)
    found = pass_at_k_advantages(rewards, [0] * 6, k)
    np.testing.assert_allclose(found, by_enumeration(rewards, k), rtol=1e-6, atol=1e-7)


def test_pass_at_1_is_grpo_by_the_populations_spread() -> None:
    plain = group_advantages(REWARDS, GROUPS, "none").advantages.astype(float)
    spread = np.repeat([np.std(REWARDS[:4]), np.std(REWARDS[4:])], 4)
    np.testing.assert_allclose(pass_at_k_advantages(REWARDS, GROUPS, 1), plain / spread, rtol=1e-6)


def test_pass_at_k_reads_its_flags_and_knows_what_teaches() -> None:
    groups = ([0.6, 0.0, 0.0, 0.0], [0.6, 0.6, 0.6, 0.0], [0.2, 0.0, 0.0, 0.0])
    found = experience(*groups)
    chosen = credit("pass_at_k", pass_k=2, pass_reward=0.5, num_generations=4)
    assert chosen == PassAtK(2, 0.5, 4)
    assert chosen.informative(found) == {0}, "in the second every pair has a right one, in the third none"
    earned, metrics = assigned("pass_at_k", *groups, pass_k=2, pass_reward=0.5, num_generations=4)
    np.testing.assert_allclose(earned[:4], by_enumeration([1.0, 0, 0, 0], 2), rtol=1e-6)
    assert not earned[4:].any()
    assert metrics["pass_at_k/groups_without_signal"] == pytest.approx(2 / 3)
    assert pass_at_k_of(4, 4, 2) == (1.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="--pass_k 9 is not between 1 and --num_generations 8"):
        credit("pass_at_k", pass_k=9, num_generations=8)


# -- OTB


def test_otb_is_the_papers_baseline_at_each_place() -> None:
    rng = np.random.default_rng(0)
    rewards, lengths = [1.0, 0.0, 0.5, NAN], [4, 2, 5, 3]
    chances = [rng.dirichlet(np.ones(6), size=n) for n in lengths]
    picked = [rng.integers(6, size=n) for n in lengths]
    logprobs = [np.log(c[np.arange(n), p]) for c, p, n in zip(chances, picked, lengths, strict=True)]
    squares = [(c**2).sum(1) for c in chances]
    found = otb_advantages(rewards, logprobs, squares)
    for row, n in enumerate(lengths):
        for t in range(n):
            if row == 3:
                assert found[row][t] == 0
                continue
            top = bottom = 0.0
            for other in range(3):
                if lengths[other] <= t:
                    continue
                # the squared norm of the gradient of log softmax in the logits, token by token
                energy = sum(
                    sum(((v == picked[other][j]) - chances[other][j][v]) ** 2 for v in range(6))
                    for j in range(t + 1)
                )
                top += energy * rewards[other]
                bottom += energy
            assert found[row][t] == pytest.approx(rewards[row] - top / bottom, abs=1e-6)
    assert found[2][4] == pytest.approx(0.0, abs=1e-6), "nobody else is as long"


def test_otb_of_equal_uncertainty_is_the_groups_mean_and_of_none_too() -> None:
    for chance in (0.5, 1.0):
        logprobs = [np.full(3, math.log(chance))] * 4
        squares = [np.full(3, 1.0 if chance == 1.0 else 0.3)] * 4
        found = otb_advantages(REWARDS[:4], logprobs, squares)
        np.testing.assert_allclose(found, np.repeat([[0.5], [-0.5], [-0.5], [0.5]], 3, axis=1), rtol=1e-6)
    equal = otb_advantages([1.0, 1.0, NAN], logprobs[:3], squares[:3])
    assert not np.concatenate(equal).any()


def test_otb_of_a_worker_is_that_of_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two groups, mixed; the advantages come back in the batch's order, with their means."""
    rng = np.random.default_rng(1)
    groups, rewards = [3, 8, 3, 8, 3], [1.0, 0.0, 0.0, 1.0, 0.0]
    columns = {
        "logprobs": [-rng.random(n) for n in (2, 3, 1, 2, 4)],
        "squares": [rng.random(n) / 2 for n in (2, 3, 1, 2, 4)],
    }

    class Rows:
        def column(self, name: str, row: int, extra: str) -> np.ndarray:
            assert extra == "squares"
            return columns[name][row]

    monkeypatch.setattr(row_stats, "read_rows", lambda batch, timeout_s: Rows())
    places = {"": np.zeros((5, 2), dtype=np.int32)}
    batch = RowBatch((), places, {"group": np.array(groups, float), "reward": np.array(rewards)})
    means, made = row_stats.token_baseline(batch, 1.0)
    for group in (3, 8):
        rows = [row for row, g in enumerate(groups) if g == group]
        want = otb_advantages(
            [rewards[r] for r in rows], *([columns[n][r] for r in rows] for n in ("logprobs", "squares"))
        )
        for row, expected in zip(rows, want, strict=True):
            np.testing.assert_array_equal(made["advantages"][row], expected)
            assert means[row] == pytest.approx(expected.mean())
    empty = RowBatch(
        (), {"": np.zeros((0, 2), dtype=np.int32)}, {"group": np.zeros(0), "reward": np.zeros(0)}
    )
    assert len(row_stats.token_baseline(empty, 1.0)[0]) == 0, "a rank without a group"


# -- names of what is there


def test_lite_ppo_is_the_groups_mean_by_the_batchs_spread() -> None:
    earned, _ = assigned("lite_ppo", REWARDS[:4], REWARDS[4:])
    centred = [r - sum(REWARDS[s : s + 4]) / 4 for s in (0, 4) for r in REWARDS[s : s + 4]]
    np.testing.assert_allclose(earned, np.array(centred) / (np.std(REWARDS, ddof=1) + 1e-4), rtol=1e-6)
    other, _ = assigned("grpo", REWARDS[:4], REWARDS[4:], scale_rewards="batch")
    np.testing.assert_array_equal(earned, other)


def test_reinforce_plus_plus_baseline_differs_from_the_other_in_the_place_of_the_kl() -> None:
    one, other = "reinforce_plus_plus_baseline", "reinforce_plus_plus"
    np.testing.assert_array_equal(
        assigned(one, REWARDS[:4], REWARDS[4:])[0], assigned(other, REWARDS[:4], REWARDS[4:])[0]
    )
    assert credit(one, beta=0.1).needs == frozenset()
    assert credit(other, beta=0.1).needs == {"ref_logprobs"}
    assert credit(one, beta=0.1, kl_in_reward=True).needs == {"ref_logprobs"}


# -- all of them


@pytest.mark.parametrize("name", NEW)
def test_order_and_unknown_rewards_do_not_matter(name: str) -> None:
    groups = (REWARDS[:4], REWARDS[4:])
    whole, _ = assigned(name, *groups, **PASS[name])
    assert whole.dtype == np.float32
    assert whole[0] > 0 > whole[1]
    mixed, _ = assigned(name, [groups[0][i] for i in (2, 0, 3, 1)], groups[1], **PASS[name])
    np.testing.assert_allclose(mixed[:4], whole[[2, 0, 3, 1]], rtol=1e-6)
    unknown, metrics = assigned(
        name, [*groups[0], NAN], groups[1], [NAN] * 5, num_generations=5, **PASS[name]
    )
    assert not unknown[[4, 9, 10, 11, 12, 13]].any()
    assert metrics["unscored_completions"] == 6
    if name not in "gpg":  # which counts groups
        np.testing.assert_allclose(np.delete(unknown, [4, *range(9, 14)]), whole, rtol=1e-6)
    assert not assigned(name, [0.5] * 4, [1.0] * 4)[0].any(), "equal rewards teach nothing"


def test_the_kl_is_not_lost_where_a_credit_does_not_take_it() -> None:
    assert set(NEW) <= set(credit_names())
    for name in ("opo", "maxrl", "gpg", "pass_at_k"):
        assert not get_credit(name).kl_in_reward
        with pytest.raises(ConfigError, match=f"--advantage_estimator {name} takes no KL off the reward"):
            credit(name, beta=0.1, kl_in_reward=True)
