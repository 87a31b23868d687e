"""A rank's snapshot brings it back bit by bit; DeepSpeed itself, on one rank, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import distributed
from raytune_rl.config import deepspeed
from raytune_rl.protocol.train import OptimizerSpec
from raytune_rl.workers import optimizer_state, snapshot
from raytune_rl.workers.engine import start_engine, step

stage, dtype = sys.argv[1], getattr(torch, sys.argv[2])
distributed.init_process_group("gloo", init_method=sys.argv[3], rank=0, world_size=1)

def engine():
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
    config = None if stage == "none" else deepspeed.load(stage)
    spec = OptimizerSpec(1e-2, "constant", 0, 10, (0.9, 0.95), 1e-8, 0.1, 1.0, config or {})
    return start_engine(module, spec, dtype)[0]

def train(one, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        one.backward(one(torch.randn(4, 5, dtype=dtype)).float().square().sum(), scale_wrt_gas=False)
        step(one)

def state(one):
    part, arrays = snapshot.take(one, 1)
    return part.entries, b"".join(array.tobytes() for array in arrays), [
        p.detach().clone() for p in one.module.parameters()
    ]

first = engine()
train(first, 3, seed=1)
part, arrays = snapshot.take(first, 1)
kept = [array.copy() for array in arrays]
before, number = state(first), torch.randn(1)
train(first, 2, seed=2)
ahead = state(first)
assert ahead[1] != before[1]
second = engine()
snapshot.put_back(second, part, kept)
back = state(second)
assert back[:2] == before[:2], "master weights, moments, step, random numbers"
assert torch.equal(torch.randn(1), number)
assert all(torch.equal(a, b) for a, b in zip(back[2], before[2])), "what the model computes with"
train(second, 2, seed=2)
again = state(second)
assert again[1] == ahead[1] and all(torch.equal(a, b) for a, b in zip(again[2], ahead[2]))
folder = Path(sys.argv[4])
snapshot.write(part, kept, str(folder), 0)
third = engine()
optimizer_state.load(third, folder, 0, 1)
train(third, 2, seed=2)
written = state(third)
assert written[1] == ahead[1], "as a checkpoint's optimizer state it is the same"
print("the same bits")
"""


@pytest.mark.parametrize(("stage", "dtype"), [("zero2", "bfloat16"), ("zero3", "float32")])
def test_a_snapshot_brings_back_every_bit_from_a_disk_too(stage: str, dtype: str, tmp_path: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, stage, dtype, f"file://{tmp_path}/meet", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "the same bits" in done.stdout
