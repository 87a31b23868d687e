"""The seeds of completions: repeatable, and none twice in a batch."""

from __future__ import annotations

import numpy as np

from raytune_rl.data.sampler import BatchPlan, stretch
from raytune_rl.groups.fleet import row_seeds, sample_seed


def test_a_prompt_that_comes_twice_in_a_round_samples_something_else() -> None:
    # Dynamic sampling draws over the border of an epoch, here 10 from 5 on of a set of 8.
    rows = stretch(8, 5, 10, seed=3, shuffle=True)
    assert len(set(rows.tolist())) < len(rows)
    seeds = row_seeds(42, 7, rows, 4)
    assert len({seed for group in seeds for seed in group}) == 40
    assert row_seeds(42, 7, rows, 4) == seeds, "a round that is done again samples the same"
    # A resumed run draws the same rows from the same place, so the same seeds.
    assert stretch(8, 5, 10, seed=3, shuffle=True).tolist() == rows.tolist()


def test_whoever_comes_once_has_the_seeds_of_its_batch_and_number() -> None:
    rows = BatchPlan(20, 6, 1, shuffle=True).batch(2)
    seeds = row_seeds(42, 2, rows, 3)
    assert seeds == [tuple(sample_seed(42, 2, int(row), s) for s in range(3)) for row in rows]
    own = np.random.SeedSequence([42, 2, int(rows[0]), 0]).generate_state(1)[0] & 0x7FFFFFFF
    assert seeds[0][0] == own
