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

from raytune_rl.pipelines.lifecycle import RunResult
from tests.cluster.conftest import Tiny
from tests.faults.runs import GRPO, Outcome, assert_same, outcome, small
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


def actors_start(out: Path) -> bool:
    """Whether the run's ranks are there, and nothing is trained yet."""
    states = ray._private.state.actors().values()
    return any(s["ActorClassName"] == "TrainerWorker" and s["State"] != "DEAD" for s in states)


def half_is_saved(out: Path) -> bool:
    return bool(list(out.glob("*/checkpoint-2")))


MOMENTS = {"starting": actors_start, "training": half_is_saved}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_goes_on_after_its_driver_was_killed(
    moment: str, tiny: Tiny, tmp_path: Path, undisturbed_grpo: Outcome
) -> None:
    before = left()
    settings = small(tiny, tmp_path, **GRPO, resume_from_checkpoint="auto")
    first = command(settings)
    out = tmp_path / "out"
    deadline = time.monotonic() + 400
    while not MOMENTS[moment](out) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    second = command(settings)  # while the actors of the first still die
    told, _ = second.communicate(timeout=400)
    assert second.returncode == 0, told
    first.communicate()
    assert ("step 1/4" in told) == (moment == "starting"), "it goes on from what is saved"
    run_dir = sorted(out.iterdir())[-1]
    assert f"RESULT {run_dir}" in told
    result = RunResult(run_dir, "finished", 4, 4, run_dir / "checkpoint-4", None)
    assert_same(outcome(result), undisturbed_grpo)
    assert_nothing_left(before)
