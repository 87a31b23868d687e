"""The gradient of a step in 16 bits does not depend on how many micro-batches it is added up from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(dtype: str, *stages: str) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.workers.accumulation", dtype, *stages],
        capture_output=True,
        text=True,
        timeout=260,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"stage"')]


@pytest.mark.timeout(280)
def test_sixteen_bits_are_added_up_in_float32_or_it_is_told() -> None:
    found = run("bfloat16", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    assert [case["stage"] for case in found] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for case in found:
        if case["stage"] == "zero1":  # DeepSpeed's own way there
            assert case["notices"] == 1
        else:
            assert case["notices"] == 0
            assert case["64"] == pytest.approx(case["1"], rel=0.2)
