"""The part of `make faults` that the normal suite runs: a policy loses a rank while it trains, and the other
while it publishes. To the last bit the run comes to what it comes to undisturbed, and leaves nothing behind.

Of ranks that hang, and of the budget of restarts, tests/groups/test_keeper.py tells in seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from tests.cluster.conftest import Tiny
from tests.faults.runs import GRPO, Outcome, assert_same, outcome, small
from tests.faults.strikes import Strike, assert_nothing_left, left, struck

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]


def test_a_policy_loses_ranks_and_the_run_comes_to_the_same_bits(
    tiny: Tiny, tmp_path: Path, undisturbed_grpo: Outcome
) -> None:
    assert undisturbed_grpo.faults == []
    before = left()
    strikes = [
        Strike("policy", 1, "train_step", version=1, after_s=0.03),
        Strike("policy", 0, "publish", version=2),
    ]
    with struck(*strikes):
        disturbed = outcome(online.run(RLHFConfig(**small(tiny, tmp_path, **GRPO))))
    assert [len(strike.struck) for strike in strikes] == [1, 1]
    assert_same(disturbed, undisturbed_grpo)
    assert [line["who"] for line in disturbed.faults] == ["policy[1]", "policy[0]"]
    assert all(line["recovered_s"] > 0 for line in disturbed.faults)
    assert_nothing_left(before)
    report = (disturbed.result.run_dir / "report.html").read_text()
    assert "Lost and started anew" in report
    assert "policy[1]" in report
