"""Policy and critic lose ranks while they train, publish and save, or hang: to the last bit the run comes to
what it comes to undisturbed, and leaves nothing behind.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster.conftest import Tiny
from tests.faults.runs import assert_same, run_ppo
from tests.faults.strikes import Strike, assert_nothing_left, left, struck

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]


def test_policy_and_critic_lose_ranks_and_the_run_comes_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    undisturbed = run_ppo(tiny, tmp_path / "undisturbed")
    assert undisturbed.faults == []
    before = left()
    strikes = [
        Strike("policy", 1, "train_step", version=1, after_s=0.03),
        Strike("critic", 0, "train_step", version=2, after_s=0.03),
        Strike("policy", 0, "train_step", version=3, signal=signal.SIGSTOP),
    ]
    with struck(*strikes):
        disturbed = run_ppo(tiny, tmp_path / "disturbed")
    assert [len(strike.struck) for strike in strikes] == [1, 1, 1]
    assert_same(disturbed, undisturbed)
    assert [line["who"] for line in disturbed.faults] == ["policy[1]", "critic[0]", "policy[0]"]
    assert disturbed.faults[2]["phase"] == "training step 4", (
        "the hang; a killed rank is missed by whoever asks next"
    )
    assert "gives no sign of life" in disturbed.faults[2]["loss"]
    assert all(line["recovered_s"] > 0 for line in disturbed.faults)
    assert_nothing_left(before)
    report = (disturbed.result.run_dir / "report.html").read_text()
    assert "Lost and started anew" in report
    assert "policy[1]" in report
