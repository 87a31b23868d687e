from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raytune_rl.data.microbatch import Schedule, duration, plan_micro_batches
from raytune_rl.data.prefix_plan import STRETCH, Budget, plan_shared, plan_step
from raytune_rl.data.shared_prefix import collate_shared
from raytune_rl.protocol.rows import Prefixes


def groups_of(prompts: list[int], each: int, completions: np.ndarray) -> tuple[np.ndarray, Prefixes]:
    """Rows of `each` completions a prompt, one group after the other."""
    groups = np.repeat(np.arange(len(prompts)), each)
    prefixes = Prefixes(groups, np.repeat(prompts, each))
    return prefixes.lengths + completions, prefixes


def laid_out(plan: Schedule, lengths: np.ndarray, prefixes: Prefixes) -> list[list[int]]:
    """Tokens of each micro-batch as the worker makes them."""

    def tokens(rows: tuple[int, ...]) -> int:
        made = [
            np.r_[
                np.full(prefixes.lengths[r], prefixes.groups[r]),
                np.arange(lengths[r] - prefixes.lengths[r]) + 7,
            ]
            for r in rows
        ]
        own = prefixes.part(np.array(rows, dtype=np.int64))
        masks = [np.zeros(len(row), bool) for row in made]
        micro = collate_shared(made, masks, own.groups, own.lengths, pad_token_id=0)
        return micro.input_ids.numel() if rows else 0

    return [[tokens(rows) for rows in rank] for rank in plan.ranks]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("together", [1, 2])
def test_invariants_hold_for_random_groups(world_size: int, together: int) -> None:
    draw = np.random.default_rng(world_size)
    for _ in range(30):
        prompts = draw.integers(1, 300, draw.integers(1, 9)).tolist()
        each = 2 * int(draw.integers(1, 5))
        lengths, prefixes = groups_of(prompts, each, draw.integers(1, 90, each * len(prompts)))
        budget = Budget(world_size, int(draw.integers(400, 1500)), "padded", "true", together)
        plan = plan_step(lengths, prefixes, budget)
        assert plan == plan_step(lengths, prefixes, budget)
        rows = [row for rank in plan.ranks for micro in rank for row in micro]
        assert Counter(rows) == Counter(range(len(lengths)))
        assert len({len(rank) for rank in plan.ranks}) == 1
        assert [list(rank) for rank in plan.tokens] == laid_out(plan, lengths, prefixes)
        assert max(max(rank) for rank in plan.tokens) <= budget.max_tokens
        assert plan.saved_tokens == lengths.sum() - sum(plan.rank_tokens)
        for rank in plan.ranks:
            for micro in rank:
                starts = micro[::together]
                assert list(micro) == [start + k for start in starts for k in range(together)]


def test_a_group_stays_whole_where_it_can() -> None:
    lengths, prefixes = groups_of([46] * 8, 8, np.full(64, 64))
    plan = plan_step(lengths, prefixes, Budget(1, 2048, "padded", "auto"))
    assert plan.shares
    assert sum(plan.rank_tokens) == 8 * (46 + 8 * 64)
    assert plan.saved_tokens == 8 * 7 * 46
    for rank in plan.ranks:
        assert all(len(Counter(row // 8 for row in micro)) * 8 == len(micro) for micro in rank)


def test_one_group_is_cut_for_two_ranks() -> None:
    lengths, prefixes = groups_of([100], 16, np.full(16, 50))
    plan = plan_step(lengths, prefixes, Budget(2, 4096, "padded", "auto"))
    assert plan.rank_tokens == (100 + 8 * 50, 100 + 8 * 50)
    assert plan.saved_tokens == 14 * 100


def test_a_group_over_the_budget_carries_its_prompt_several_times() -> None:
    lengths, prefixes = groups_of([500], 8, np.full(8, 200))
    plan = plan_step(lengths, prefixes, Budget(1, 1000, "padded", "true"))
    assert plan.tokens == ((900,) * 4,)


def test_long_prompts_share_beyond_a_budget_that_no_row_keeps() -> None:
    lengths, prefixes = groups_of([2048], 8, np.full(8, 64))
    plan = plan_step(lengths, prefixes, Budget(1, 2048, "padded", "auto"))
    assert plan.tokens == ((2048 + 8 * 64,),)
    assert max(plan.tokens[0]) <= STRETCH * 2112


def test_auto_shares_only_what_pays() -> None:
    equal, prefixes = groups_of([1], 2, np.array([60, 60]))
    apart = Prefixes(np.arange(2), prefixes.lengths)
    budget = Budget(1, 2048, "padded", "auto")
    assert not plan_step(equal, apart, budget).shares  # nothing in common
    assert not plan_step(equal, None, budget).shares
    assert not plan_step(equal, prefixes, Budget(1, 2048, "padded", "false")).shares
    # Cut in two, for two ranks, the prompt is computed as often as without.
    halves, prefixes = groups_of([500], 2, np.array([5, 5]))
    wide = Budget(2, 2048, "padded", "auto")
    plain = plan_micro_batches(halves, world_size=2, max_tokens=2048, layout="padded")
    assert duration(plan_step(halves, prefixes, wide), 2048) <= duration(plain, 2048)


def test_rows_that_are_all_prefix_keep_a_token() -> None:
    prefixes = Prefixes(np.zeros(2, np.int64), np.array([4, 4]))
    plan = plan_shared(np.array([4, 9]), prefixes, Budget(1, 100, "padded", "true"))
    assert plan.rank_tokens == (3 + 1 + 6,)


def test_no_rows() -> None:
    empty = np.array([], dtype=np.int64)
    plan = plan_step(empty, Prefixes(empty, empty), Budget(2, 100, "padded", "true"))
    assert plan.ranks == ((), ())
