"""The driver is killed on a cluster that it has joined: the same command goes on at once, and nothing of the
first is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.cluster.conftest import Tiny
from tests.faults.runs import assert_same, outcome, small
from tests.faults.strikes import assert_nothing_left, left

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("cluster"),
]
PROGRAM = """
import json, sys
from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
result = online.run(RLHFConfig(**json.loads(sys.argv[1])))
print("RESULT", result.run_dir)
"""


def command(settings: dict[str, Any]) -> subprocess.Popen[str]:
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(settings)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_same_command_goes_on_after_its_driver_was_killed(tiny: Tiny, tmp_path: Path) -> None:
    from raytune_rl.config import RLHFConfig
    from raytune_rl.pipelines import lifecycle, online

    more: dict[str, Any] = {"num_generations": 4, "max_steps": 4, "save_steps": 2, "beta": 0.0}
    undisturbed = outcome(online.run(RLHFConfig(**small(tiny, tmp_path / "undisturbed", **more))))
    before = left()
    settings = small(tiny, tmp_path / "disturbed", **more, resume_from_checkpoint="auto")
    first = command(settings)
    out = tmp_path / "disturbed" / "out"
    deadline = time.monotonic() + 400
    while not list(out.glob("*/checkpoint-2")) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    second = command(settings)
    told, _ = second.communicate(timeout=400)
    assert second.returncode == 0, told
    first.communicate()
    assert "checkpoint-2" in told, "it went on"
    (run_dir,) = out.iterdir()
    assert f"RESULT {run_dir}" in told
    checkpoint = run_dir / "checkpoint-4"
    result = lifecycle.RunResult(run_dir, "finished", 4, 4, checkpoint, None)
    assert_same(outcome(result), undisturbed)
    assert_nothing_left(before)
