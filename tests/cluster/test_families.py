"""Engines serve what was published: mixtures, over three weight versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

JOBS = ("qwen3_moe:experts", "gpt_oss:full", "qwen2_moe:full")


def test_log_probs_agree_after_every_version(tmp_path: Path) -> None:
    out = tmp_path / "gaps.jsonl"
    program = [sys.executable, "-m", "tests.families", *JOBS, "--heads", "untied", "--out", str(out)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [f"{line['family']}:{line['asked']}" for line in lines] == list(JOBS)
    for line in lines:
        assert len(line["gaps"]) == 3
        assert max(line["gaps"]) < 1e-4, line
