"""A node is lost with its object store and all that ran there: the run begins again from its checkpoint, on
the nodes that are left, and comes to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_rl.pipelines.lifecycle import RunResult
from tests.cluster.conftest import Tiny
from tests.faults.runs import GRPO, Outcome, assert_same, outcome, small

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_lost_node_costs_the_steps_since_the_checkpoint(
    tiny: Tiny, tmp_path: Path, undisturbed_grpo: Outcome
) -> None:
    settings = small(tiny, tmp_path, **GRPO)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = [sys.executable, "-m", "tests.faults.lost_node", json.dumps(settings)]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert len(told["removed"]) == 1
    assert "The run begins again from its newest checkpoint" in ended.stderr
    run_dir = Path(told["run_dir"])
    result = RunResult(run_dir, told["status"], 4, 4, run_dir / "checkpoint-4", None)
    assert_same(outcome(result), undisturbed_grpo)
