"""Nodes come, vanish and leave under a fleet at work; no prompt is lost, and no array of a finished one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
@pytest.mark.variants
def test_each_prompt_is_answered_once_whatever_happens_to_nodes() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-m", "tests.groups.fleet_nodes"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOLD ")]
    assert lines, run.stderr[-5000:]
    told = json.loads(lines[0].removeprefix("TOLD "))
    assert told["each_once"], told
    assert told["at_the_start"] == 1
    # Joined: 1, 2 more, one for the lost; two nodes are left, so nobody for the one that left. One idled.
    assert told["counts"] == [4, 2, 1]
    assert told["arrays_outlive_their_node"]
    assert told["losses_by_draining"] == 0
    lost, leaving = told["said"]
    assert lost.startswith("rollout[")
    assert "Another is asked for, and its work is done again" in lost
    assert "is going to leave the cluster: others get its prompts" in leaving
