"""A whole run as on a GPU that policy, engine and reference share, on one that is only declared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
@pytest.mark.variants
def test_they_start_in_turn_and_the_engine_stays_the_policy(tiny: Tiny, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = (str(tiny.untied), str(tiny.data.train), str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.declared_gpu", *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("BEGIN ", "READY ", "LOG "))]
    assert said, done.stderr[-3000:]
    shared = [line for line in said[:-1] if "reward" not in line]
    assert shared == [
        f"{event} {group} [0]" for group in ("rollout", "policy", "reference") for event in ("BEGIN", "READY")
    ]
    log = [line for line in json.loads(said[-1].removeprefix("LOG ")) if "loss" in line]
    assert len(log) == 2
    assert all(line["rollout_correction/logp_abs_diff_max"] < 1e-4 for line in log)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 1e-6, "the reference stayed as it was, also away from the device"
