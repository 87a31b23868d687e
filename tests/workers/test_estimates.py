"""PPO's estimates in the worker: the same numbers however the rows are shared among workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.gae import gae, token_rewards
from raytune_rl.algorithms.metrics import merge_all
from raytune_rl.algorithms.moments import merge_moments
from raytune_rl.data.read_rows import ReadRows
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import EstimateSettings
from raytune_rl.workers.estimates import estimate, reward_moments, whitened
from tests.algorithms.step import rows_of

LENGTHS = (5, 1, 7, 3, 2, 9)
SCORES = np.array([1.0, -0.5, np.nan, 2.0, 0.25, 0.0])
SETTINGS = EstimateSettings(kl_coef=0.3, gamma=0.98, lam=0.9)
KNOWN = [row for row in range(len(LENGTHS)) if np.isfinite(SCORES[row])]


def columns() -> dict[str, Columns]:
    """Log-probs lie under the name "logprobs", as workers give them; values under their own."""
    rng = np.random.default_rng(3)

    def flat() -> Ragged:
        return Ragged.from_rows([rng.normal(size=n) for n in LENGTHS], np.float32)

    return {
        "old_logprobs": {"logprobs": flat()},
        "ref_logprobs": {"logprobs": flat()},
        "values": {"values": flat()},
    }


def share(held: dict[str, Columns], which: Sequence[int]) -> ReadRows:
    pointers = {name: [RowPointer(name, row) for row in which] for name in held}
    rows = next(iter(pointers.values()))
    batch = TrainBatch(rows, np.ones(len(rows), dtype=np.int64), pointers).message()
    return ReadRows(batch, [held[ref] for ref in batch.refs])


def run(
    parts: Sequence[Sequence[int]], whiten_rewards: bool
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The driver's part, over the given shares; columns come back in the order of the rows."""
    held = columns()
    shares = [(share(held, part), SCORES[list(part)]) for part in parts]
    rewards = merge_moments(reward_moments(*s, SETTINGS) for s in shares) if whiten_rewards else None
    made = [estimate(*s, SETTINGS, rewards) for s in shares]
    step = merge_moments(facts.advantages for facts, _ in made)
    out: dict[str, dict[int, np.ndarray]] = {"advantages": {}, "returns": {}, "white": {}}
    for part, (_, found), (_, scores) in zip(parts, made, shares, strict=True):
        means, white = whitened(share({"advantages": found}, range(len(part))), scores, step)
        own = [white["advantages"][number].mean() for number in range(len(part))]  # type: ignore[index]
        np.testing.assert_allclose(means, own, atol=1e-6)
        for number, row in enumerate(part):
            out["advantages"][row] = found["advantages"][number]  # type: ignore[index]
            out["returns"][row] = found["returns"][number]  # type: ignore[index]
            out["white"][row] = white["advantages"][number]  # type: ignore[index]
    flat = {name: np.concatenate([rows[r] for r in range(len(LENGTHS))]) for name, rows in out.items()}
    return flat, merge_all(facts.metrics for facts, _ in made).result()


def known(flat: np.ndarray) -> np.ndarray:
    row_of = rows_of(LENGTHS).numpy()
    return flat[np.isin(row_of, KNOWN)]


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_any_number_of_workers_comes_to_the_definition(whiten_rewards: bool) -> None:
    held, row_of = columns(), rows_of(LENGTHS)
    old, ref, values = (
        torch.from_numpy(held[name][inner].values.astype(np.float64))  # type: ignore[union-attr]
        for name, inner in (("old_logprobs", "logprobs"), ("ref_logprobs", "logprobs"), ("values", "values"))
    )
    scores = torch.from_numpy(np.nan_to_num(SCORES))
    rewards = token_rewards(scores, old, ref, row_of, len(LENGTHS), kl_coef=0.3)
    if whiten_rewards:
        mean, std = known(rewards.numpy()).mean(), known(rewards.numpy()).std(ddof=1)
        rewards = (rewards - mean) / std + mean
    want = gae(rewards, values, row_of, len(LENGTHS), gamma=0.98, lam=0.9)
    whole, metrics = run([range(len(LENGTHS))], whiten_rewards)
    np.testing.assert_allclose(
        known(whole["advantages"]), known(want.advantages.numpy()), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(known(whole["returns"]), known(want.returns.numpy()), rtol=1e-5, atol=1e-6)
    white = known(whole["white"])
    assert white.mean() == pytest.approx(0, abs=1e-6)
    assert white.std(ddof=1) == pytest.approx(1, abs=1e-5)
    for cut in ([[4, 0], [2, 5], [], [1, 3]], [[5], [4], [3], [2], [1], [0]]):
        flat, again = run(cut, whiten_rewards)
        for name, column in flat.items():
            np.testing.assert_allclose(column, whole[name], rtol=2e-7, atol=1e-7)
        assert again == pytest.approx(metrics, rel=1e-12)


def test_a_row_without_a_score_teaches_nothing_and_counts_nowhere() -> None:
    whole, metrics = run([range(len(LENGTHS))], False)
    without, same = run([KNOWN, [2]], False)
    unscored = rows_of(LENGTHS).numpy() == 2
    assert (whole["advantages"][unscored] == 0).all()
    assert (whole["white"][unscored] == 0).all()
    values = columns()["values"]["values"].values  # type: ignore[union-attr]
    np.testing.assert_array_equal(whole["returns"][unscored], values[unscored])
    for name in ("advantages", "returns", "white"):
        assert (known(whole[name]) != 0).all()
        np.testing.assert_allclose(known(without[name]), known(whole[name]), rtol=2e-7, atol=1e-7)
    assert metrics["objective/scores"] == pytest.approx(np.nanmean(SCORES))
    assert metrics["objective/rlhf_reward"] == pytest.approx(
        metrics["objective/scores"] + metrics["objective/non_score_reward"]
    )
    assert same == pytest.approx(metrics, rel=1e-12)


def test_without_a_price_of_kl_there_is_no_reference() -> None:
    held = columns()
    del held["ref_logprobs"]
    free = EstimateSettings(kl_coef=0.0, gamma=1.0, lam=1.0)
    facts, found = estimate(share(held, range(6)), SCORES, free)
    ends = np.cumsum(LENGTHS) - 1
    returns = found["returns"].values  # type: ignore[union-attr]
    np.testing.assert_allclose(returns[ends][KNOWN], SCORES[KNOWN], atol=1e-6)
    assert facts.metrics.result()["objective/kl"] == 0
