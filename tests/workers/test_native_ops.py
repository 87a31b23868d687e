"""A compilation whose process was killed stops nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

PROGRAM = "from raytune_rl.workers.native_ops import compile_ops; compile_ops(240.0); print('compiled')"


@pytest.mark.timeout(280)
def test_what_a_killed_compiler_left_holds_nobody_up() -> None:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    left = root / "raytune_rl" / f"torch-{torch.__version__}" / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=260,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ran.stdout.endswith("compiled\n"), ran.stderr
    assert not left.exists()
