import itertools
import random

import numpy as np
import pytest

from raytune_rl.data.microbatch import Schedule, plan_micro_batches
from raytune_rl.errors import ConfigError


def padded_tokens(rows, lengths):
    return max(lengths[r] for r in rows) * len(rows) if rows else 0


def packed_tokens(rows, lengths):
    return sum(lengths[r] for r in rows)


TOKENS = {"padded": padded_tokens, "packed": packed_tokens}


def check_invariants(plan: Schedule, lengths, world_size, max_tokens, layout, max_rows):
    rows = sorted(row for rank in plan.ranks for micro in rank for row in micro)
    assert rows == list(range(len(lengths)))
    assert len(plan.ranks) == world_size
    assert {len(rank) for rank in plan.ranks} == {plan.n_micro_batches}
    for rank, costs in zip(plan.ranks, plan.tokens, strict=True):
        for micro, cost in zip(rank, costs, strict=True):
            assert cost == TOKENS[layout](micro, lengths)
            assert cost <= max_tokens or len(micro) == 1
            assert max_rows is None or len(micro) <= max_rows


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_invariants_hold_for_random_lengths(layout):
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 90)
        lengths = [max(1, int(rng.lognormvariate(4, rng.choice([0.0, 0.5, 1.5])))) for _ in range(n)]
        world_size, max_tokens = rng.randint(1, 9), rng.randint(1, 3000)
        max_rows = rng.choice([None, 1, 3, 16])
        arguments = {
            "world_size": world_size,
            "max_tokens": max_tokens,
            "layout": layout,
            "max_rows": max_rows,
            "quadratic": rng.choice([0.0, 0.01]),
        }
        plan = plan_micro_batches(lengths, **arguments)
        check_invariants(plan, lengths, world_size, max_tokens, layout, max_rows)
        assert plan == plan_micro_batches(np.array(lengths), **arguments)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_rank_never_exceeds_another_by_more_than_one_micro_batch(layout):
    rng = random.Random(1)
    for _ in range(100):
        lengths = [rng.randint(1, 600) for _ in range(rng.randint(8, 200))]
        plan = plan_micro_batches(lengths, world_size=4, max_tokens=1024, layout=layout)
        largest = max(cost for costs in plan.tokens for cost in costs)
        assert max(plan.rank_tokens) - min(plan.rank_tokens) <= largest


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_many_similar_rows_are_balanced_within_a_few_percent(layout):
    rng = random.Random(2)
    lengths = [rng.randint(80, 140) for _ in range(512)]
    plan = plan_micro_batches(lengths, world_size=8, max_tokens=4096, layout=layout)
    assert max(plan.rank_tokens) <= 1.04 * min(plan.rank_tokens)


def test_one_budget_full_of_rows_is_still_shared_by_all_ranks():
    plan = plan_micro_batches([10] * 64, world_size=2, max_tokens=100_000, layout="padded")
    assert plan.n_micro_batches == 1
    assert plan.rank_tokens == (320, 320)


def test_no_more_micro_batches_than_the_budget_forces():
    # 12 rows of 100 under 400 are three full micro-batches; two ranks need an even number.
    for layout in ("padded", "packed"):
        plan = plan_micro_batches([100] * 12, world_size=2, max_tokens=400, layout=layout)
        assert plan.n_micro_batches == 2
        assert plan.rank_tokens == (600, 600)


def test_padded_rows_of_like_length_share_a_micro_batch():
    lengths = [10, 100] * 8
    plan = plan_micro_batches(lengths, world_size=1, max_tokens=800, layout="padded")
    assert sum(plan.rank_tokens) == sum(lengths)  # not one padding token


def test_a_row_over_the_budget_is_alone():
    plan = plan_micro_batches([5000, 10, 10], world_size=1, max_tokens=100, layout="packed")
    assert (0,) in plan.ranks[0]
    assert plan.ranks[0] == ((0,), (1, 2))


def test_fewer_rows_than_ranks_leave_dummies():
    plan = plan_micro_batches([7, 9], world_size=4, max_tokens=100, layout="packed")
    assert sorted(rank[0] for rank in plan.ranks) == [(), (), (0,), (1,)]


def test_ranks_in_step_run_micro_batches_of_like_cost():
    rng = random.Random(3)
    lengths = [rng.randint(1, 500) for _ in range(200)]
    plan = plan_micro_batches(lengths, world_size=4, max_tokens=2000, layout="packed")
    waiting = sum(max(costs) * 4 - sum(costs) for costs in zip(*plan.tokens, strict=True))
    assert waiting < 0.02 * sum(lengths)


def test_quadratic_cost_balances_attention_instead_of_tokens():
    # One row of 1000 costs as much as many short rows of the same number of tokens, and more with attention.
    lengths = [1000] + [100] * 30
    by_tokens = plan_micro_batches(lengths, world_size=2, max_tokens=1000, layout="packed")
    by_cost = plan_micro_batches(lengths, world_size=2, max_tokens=1000, layout="packed", quadratic=0.01)

    def with_long_row(plan):
        return next(
            sum(lengths[r] for m in rank for r in m) for rank in plan.ranks if any(0 in m for m in rank)
        )

    assert with_long_row(by_cost) <= with_long_row(by_tokens)


def test_no_rows():
    plan = plan_micro_batches([], world_size=3, max_tokens=10, layout="packed")
    assert plan.ranks == ((), (), ())
    assert plan.n_micro_batches == 0


@pytest.mark.parametrize(
    "wrong",
    [{"world_size": 0}, {"max_tokens": 0}, {"max_rows": 0}, {"layout": "flat"}],
    ids=lambda w: next(iter(w)),
)
def test_impossible_requests_are_config_errors(wrong):
    arguments = {"world_size": 1, "max_tokens": 10, "layout": "packed", **wrong}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        plan_micro_batches([1, 2], **arguments)


def test_an_empty_row_is_refused():
    with pytest.raises(ValueError, match="row 1 has 0 tokens"):
        plan_micro_batches([3, 0], world_size=1, max_tokens=10, layout="packed")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_pairs_stay_together_and_in_order(layout):
    rng = random.Random(4)
    for _ in range(100):
        lengths = [max(1, int(rng.lognormvariate(4, 1))) for _ in range(2 * rng.randint(1, 60))]
        world_size, max_tokens = rng.randint(1, 5), rng.randint(1, 2000)
        plan = plan_micro_batches(
            lengths, world_size=world_size, max_tokens=max_tokens, layout=layout, together=2
        )
        micros = [micro for rank in plan.ranks for micro in rank]
        assert sorted(row for micro in micros for row in micro) == list(range(len(lengths)))
        assert len({len(rank) for rank in plan.ranks}) == 1
        for micro, cost in zip(micros, [c for costs in plan.tokens for c in costs], strict=True):
            assert all(row % 2 == 0 for row in micro[0::2])
            assert [row + 1 for row in micro[0::2]] == list(micro[1::2])
            assert cost == TOKENS[layout](micro, lengths)
            assert cost <= max_tokens or len(micro) == 2


def test_pairs_have_two_rows():
    with pytest.raises(ValueError, match="3 rows are no whole number of units of 2"):
        plan_micro_batches([1, 2, 3], world_size=1, max_tokens=10, layout="padded", together=2)
    with pytest.raises(ConfigError, match="2 rows must stay together"):
        plan_micro_batches([1, 2], world_size=1, max_tokens=10, layout="padded", together=2, max_rows=1)


def test_padded_runs_have_the_least_padding():
    """Against all ways of cutting the sorted rows into as many runs."""
    rng = random.Random(5)
    for _ in range(40):
        lengths = sorted((max(1, int(rng.lognormvariate(3, 1.2))) for _ in range(9)), reverse=True)
        budget = lengths[0] * rng.randint(2, 4)
        plan = plan_micro_batches(lengths, world_size=1, max_tokens=budget, layout="padded")
        cuts = (
            [0, *inner, 9]
            for count in range(plan.n_micro_batches)
            for inner in itertools.combinations(range(1, 9), count)
        )
        runs = ([lengths[a:b] for a, b in itertools.pairwise(cut)] for cut in cuts)
        costs = [[len(run) * run[0] for run in parts] for parts in runs]
        within = [sum(parts) for parts in costs if max(parts) <= budget]
        assert sum(plan.rank_tokens) == min(within)


def test_a_long_tail_is_not_padded_to():
    rng = random.Random(6)
    lengths = [max(1, int(rng.lognormvariate(5, 1))) for _ in range(64)]
    for world_size in (1, 2):
        for max_tokens in (2 * max(lengths), 8 * max(lengths)):
            plan = plan_micro_batches(lengths, world_size=world_size, max_tokens=max_tokens, layout="padded")
            assert sum(plan.rank_tokens) < 1.35 * sum(lengths), (world_size, max_tokens)


def test_no_micro_batch_is_added_for_a_little_padding():
    lengths = [100, 98, 97, 95] * 4
    plan = plan_micro_batches(lengths, world_size=1, max_tokens=4096, layout="padded")
    assert plan.n_micro_batches == 1
