"""Every prompt that is sampled from is accounted for: finished, filtered or failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.experience import Experience
from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines.collect import Collector
from raytune_rl.pipelines.group_flow import Outside
from raytune_rl.pipelines.online_algorithms import credit_of
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.pipelines.scoring import Scoring
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.tracking.timer import StepTimer
from tests.algorithms.test_experience import experience

NAN = float("nan")
KINDS = ([0.0, 1.0], [1.0, 1.0], [NAN, NAN], [NAN, 1.0])
"""Of prompts 0 to 3, and of 4 to 7 likewise: it teaches, it does not, it has no reward, it has one."""


class Told(Collector):
    """Knows the rewards of each prompt."""

    def groups_of(self, rows: Any, batch: int, version: int, timer: Any) -> Experience:
        self._state.prompt_counts["dispatched"] += len(rows)
        return experience(*(KINDS[row % 4] for row in rows))


def collected(dynamic: bool, saved: dict[str, Any], generations: range) -> RunState:
    config = RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", dynamic_sample=dynamic, max_resample_times=3
    )
    groups: Any = SimpleNamespace(rollout=None)
    prompts: Any = range(8)
    state = RunState.restored(saved)
    scoring = Scoring(config, groups, state, str, lambda *_: None)
    made = Told(config, groups, prompts, 4, state, credit_of(config), scoring, Outside())
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
