"""Packs: every row once an epoch, within the capacity, and a step's rows found from its number."""

from __future__ import annotations

import numpy as np

from raytune_rl.data.packing import PackBatches, Packs

LENGTHS = np.random.default_rng(0).integers(3, 60, 101)


def test_every_row_is_in_one_pack_and_no_pack_is_too_long() -> None:
    packs = Packs(LENGTHS, 64, seed=1)
    for epoch in (0, 1, 2):
        planned = packs.epoch(epoch)
        assert sorted(row for pack in planned for row in pack) == list(range(101))
        assert all(LENGTHS[pack].sum() <= 64 for pack in planned)
        assert len(planned) == len(packs)
    # Best fit wastes little: well under what one row a pack would.
    assert len(packs) <= 1.1 * LENGTHS.sum() / 64
    assert packs.epoch(0) != packs.epoch(1)


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    fresh = PackBatches(Packs(LENGTHS, 64, seed=1), 4)
    steps = -(-len(fresh.packs) // 4)
    walked = [PackBatches(Packs(LENGTHS, 64, seed=1), 4).batch(k).tolist() for k in range(2 * steps)]
    assert [fresh.batch(k).tolist() for k in reversed(range(2 * steps))] == walked[::-1]
    for epoch in (walked[:steps], walked[steps:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(101))


def test_without_shuffle_every_epoch_is_the_same() -> None:
    packs = Packs(LENGTHS, 64, seed=1, shuffle=False)
    assert packs.epoch(0) == packs.epoch(3)


def test_a_row_longer_than_a_pack_stands_alone() -> None:
    packs = Packs(np.array([5, 100, 5]), 10, seed=0)
    assert sorted(sorted(pack) for pack in packs.epoch(0)) == [[0, 2], [1]]
