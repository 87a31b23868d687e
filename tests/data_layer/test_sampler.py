from collections import Counter

import numpy as np
import pytest

from raytune_rl.data.sampler import BatchPlan, order
from raytune_rl.errors import ConfigError


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    first = order(50, 0, seed=7, shuffle=True)
    assert sorted(first.tolist()) == list(range(50))
    assert first.dtype == np.int64
    assert order(50, 0, seed=7, shuffle=True).tolist() == first.tolist()
    assert order(50, 1, seed=7, shuffle=True).tolist() != first.tolist()
    assert order(50, 0, seed=8, shuffle=True).tolist() != first.tolist()
    assert order(4, 3, seed=7, shuffle=False).tolist() == [0, 1, 2, 3]


def test_every_prompt_is_given_out_once_or_named_as_dropped():
    plan = BatchPlan(n=23, batch_size=5, seed=1)
    for epoch in range(3):
        batches = [plan.batch(epoch * plan.batches_per_epoch + k) for k in range(plan.batches_per_epoch)]
        assert all(len(batch) == 5 for batch in batches)
        given = Counter(np.concatenate([*batches, plan.dropped(epoch)]).tolist())
        assert given == Counter(range(23))
        assert len(plan.dropped(epoch)) == 3


def test_without_drop_last_the_rest_is_a_shorter_batch():
    plan = BatchPlan(n=7, batch_size=3, seed=1, shuffle=False, drop_last=False)
    assert [plan.batch(k).tolist() for k in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    assert plan.dropped(0).tolist() == []


def test_too_few_prompts_say_what_to_do():
    with pytest.raises(ConfigError, match="takes 8 prompts but the data set has 5"):
        BatchPlan(n=5, batch_size=8, seed=0)
