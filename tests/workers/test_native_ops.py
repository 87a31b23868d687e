"""Training starts on a machine without ninja or a compiler, and compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from torch import distributed
from raytune_rl.workers.engine import start_engine, step
from raytune_rl.protocol.train import OptimizerSpec
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
module = torch.nn.Linear(2, 1)
spec = OptimizerSpec(1e-2, "constant", 0, 1, (0.9, 0.99), 1e-8, 0.0, 1.0, {"zero_optimization": {"stage": 2}})
engine, _ = start_engine(module, spec, torch.float32)
engine.backward(engine(torch.ones(1, 2)).sum())
print("norm", step(engine))
"""


@pytest.mark.timeout(280)
def test_an_engine_starts_without_ninja_and_compiles_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=260,
        env={
            **os.environ,
            "PATH": "",
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29555",
        },
    )
    assert "norm 1.73" in ran.stdout, ran.stderr
    assert not list(tmp_path.iterdir())
