"""The seeds of completions: repeatable, and none twice in a batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raytune_rl.data.sampler import BatchPlan, stretch
from raytune_rl.groups.seeds import first_words, row_seeds, sample_seed


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


@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 7])
def test_they_are_those_of_numpys_seed_sequence(seed: int) -> None:
    """Also of a batch number that evaluations have, of prompts that come again, and beyond 32 bits."""
    rng = np.random.default_rng(1)
    for batch in (0, 3, 2**31, int(rng.integers(2**20))):
        rows = [*rng.integers(0, 10**6, 20).tolist(), 5, 5, 5]
        expected, before = [], Counter[int]()
        for row in rows:
            again = (before[row],) if before[row] else ()
            entropies = [(seed, batch, row, sample, *again) for sample in range(3)]
            expected.append(
                tuple(int(np.random.SeedSequence(e).generate_state(1)[0] & 0x7FFFFFFF) for e in entropies)
            )
            before[row] += 1
        assert row_seeds(seed, batch, rows, 3) == expected
    assert row_seeds(seed, 0, [], 3) == []


@pytest.mark.parametrize("words", [1, 2, 3, 4, 5, 6, 9])
def test_entropies_of_any_length(words: int) -> None:
    entropy = np.random.default_rng(words).integers(0, 2**32, (50, words))
    own = [int(np.random.SeedSequence(one.tolist()).generate_state(1)[0]) for one in entropy]
    assert first_words(entropy).tolist() == own
