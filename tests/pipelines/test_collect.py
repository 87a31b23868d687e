"""Every prompt that is sampled from is accounted for: finished, filtered or failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.experience import Experience
from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines.collect import Collector
from raytune_rl.pipelines.online_algorithms import credit_of
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.tracking.timer import StepTimer
from tests.algorithms.test_experience import experience

NAN = float("nan")
KINDS = ([0.0, 1.0], [1.0, 1.0], [NAN, NAN], [NAN, 1.0])
"""Of prompts 0 to 3, and of 4 to 7 likewise: it teaches, it does not, it has no reward, it has one."""


class Told(Collector):
    """Knows the rewards of each prompt."""

    def sample(self, prompts: Any, rows: Any, *args: Any, **kwargs: Any) -> list[Trajectory]:
        self.rows = list(rows)
        return []

    def score(self, batch: Any, prompts: Any, state: Any) -> Experience:
        return experience(*(KINDS[row % 4] for row in self.rows))


def collected(dynamic: bool, saved: dict[str, Any], generations: range) -> RunState:
    config = RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", dynamic_sample=dynamic, max_resample_times=3
    )
    groups: Any = None
    prompts: Any = range(8)
    state = RunState.restored(saved)
    made = Told(config, groups, prompts, 4, state, credit_of(config), lambda _: None)
    for generation in generations:
        made.collect(generation, 0, TrainerState(0, 1), StepTimer())
    return state


@pytest.mark.parametrize("dynamic", [False, True])
def test_counts_add_up(dynamic: bool) -> None:
    straight = collected(dynamic, {}, range(4))
    account = straight.account()
    assert account.unaccounted == 0
    assert account.dispatched == (straight.prompts_drawn if dynamic else 16)
    assert account.failed["no completion has a reward"] > 0
    assert sum(account.filtered.values()) > 0 if dynamic else not account.filtered
    halves = collected(dynamic, collected(dynamic, {}, range(2)).as_dict(), range(2, 4))
    assert halves.account() == account, "a resumed run goes on counting"


def test_groups_without_a_reward() -> None:
    found = experience([0.0, 1.0], [NAN, NAN], [NAN, 1.0])
    assert found.unscored() == {1}
    assert found.of_groups({0}).unscored() == set()
    assert np.isfinite(found.rewards).sum() == 3
