"""A program: gradients of one step, added up over micro-batches by a DeepSpeed world of one rank in 16 bits.

python -m tests.workers.accumulation DTYPE STAGE... prints, by stage and for 1, 8 and 64 micro-batches, the
largest relative error of a parameter's gradient against float64, and under "notices" how many lines tell of
rounding.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import torch
from torch import nn


def gradients(
    model: nn.Module, stage: str, parts: int, rows: torch.Tensor, wanted: torch.Tensor
) -> tuple[list[torch.Tensor], int]:
    from deepspeed.utils import safe_get_full_grad

    from raytune_rl.config import deepspeed
    from raytune_rl.protocol.train import OptimizerSpec
    from raytune_rl.workers.engine import rounded_sums, start_engine

    spec = OptimizerSpec(1e-2, "constant", 0, 9, (0.9, 0.95), 1e-8, 0.0, 0.0, deepspeed.for_engine(stage))
    engine, _ = start_engine(copy.deepcopy(model), spec, rows.dtype)
    engine.train()
    pieces = list(zip(rows.chunk(parts), wanted.chunk(parts), strict=True))
    for number, (x, y) in enumerate(pieces):
        engine.set_gradient_accumulation_boundary(number == parts - 1)
        engine.backward((engine(x) - y).float().square().sum() / len(rows), scale_wrt_gas=False)
        if number != parts - 1:
            engine.step()
    found = [safe_get_full_grad(p).float().clone() for p in engine.module.parameters()]
    return found, len(rounded_sums(engine))


def main(dtype: torch.dtype, stages: list[str]) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    rows, wanted = torch.randn(64, 32).to(dtype) + 0.5, torch.randn(64, 8).to(dtype)
    exact = copy.deepcopy(model).double()
    ((exact(rows.double()) - wanted.double()).square().sum() / len(rows)).backward()
    true = [p.grad.float() for p in exact.parameters() if p.grad is not None]
    for stage in stages:
        errors = {}
        for parts in (1, 8, 64):
            found, errors["notices"] = gradients(model, stage, parts, rows, wanted)
            pairs = zip(found, true, strict=True)
            errors[str(parts)] = max(float((a.view_as(t) - t).norm() / t.norm()) for a, t in pairs)
        print(json.dumps({"stage": stage, **errors}), flush=True)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2:])
