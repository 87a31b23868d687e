"""A node is lost with its object store and all that ran there, the policy too: the run begins again on the
nodes that are left, from the snapshot of which the driver's node has a copy, or else from its checkpoint, and
comes to the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.pipelines.lifecycle import RunResult
from tests.cluster.conftest import Tiny
from tests.faults.runs import GRPO, Outcome, assert_same, outcome, small

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("settings", "origin", "steps"),
    [
        ({"save_steps": 4}, "its newest snapshot, saved as rescued-3", [1, 2, 3, 4]),
        ({"snapshot_steps": 0}, "its newest checkpoint", [1, 2, 3, 3, 4]),
    ],
    ids=["nothing where there are snapshots", "the steps since the checkpoint without"],
)
def test_a_lost_node_costs(
    settings: dict[str, Any],
    origin: str,
    steps: list[int],
    tiny: Tiny,
    tmp_path: Path,
    undisturbed_grpo: Outcome,
) -> None:
    given = small(tiny, tmp_path, **{**GRPO, **settings})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = [sys.executable, "-m", "tests.faults.lost_node", json.dumps(given)]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert len(told["removed"]) == 1
    assert f"The run begins again from {origin}" in ended.stderr
    assert told["steps"] == steps, "each is trained once, or what was not kept once more"
    run_dir = Path(told["run_dir"])
    assert not list(run_dir.glob("rescued-*"))
    result = RunResult(run_dir, told["status"], 4, 4, run_dir / "checkpoint-4", None)
    assert_same(outcome(result), undisturbed_grpo)
