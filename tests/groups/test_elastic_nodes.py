"""Ray's autoscaler brings nodes for engines that have no place, and takes away those that hold none:
`make variants`, not of the test suite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.variants]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-m", "tests.groups.elastic_nodes"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOLD ")]
    assert lines, run.stderr[-5000:]
    return json.loads(lines[0].removeprefix("TOLD "))


def test_nodes_come_with_the_work_and_go_with_it(told: dict[str, Any]) -> None:
    assert told["at_the_start"] == [1, 1], "engines and nodes"
    assert told["grown"] == [3, 3]
    assert told["shrunk"] == [1, 1]


def test_a_node_that_is_announced_to_leave_is_cleared_before_it_does(told: dict[str, Any]) -> None:
    assert told["drained"] == [1]
    assert told["elsewhere"], "Ray places nothing on it any more"
    assert "the node of rollout[1] is going to leave" in told["said"][0]
    assert told["counts"] == {"unplaced": 0, "joined": 4, "left": 3, "lost": 0}
