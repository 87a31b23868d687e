"""Weights that go to the CPU and come back are the same, also where ZeRO-3 has cut up frozen ones."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest


def _losses(stage: int, moved: bool) -> tuple[list[float], list[str]]:
    """Losses of a few steps of four layers, two of them frozen; the weights are moved after each step."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch
    from torch import distributed, nn

    from raytune_rl.config.deepspeed import for_engine
    from raytune_rl.protocol.train import OptimizerSpec
    from raytune_rl.workers.engine import start_engine
    from raytune_rl.workers.offload import Offload

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    # Vectors and matrices are groups of their own, so the order of the groups is not that of the module.
    model = nn.Sequential(
        nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 40), nn.Linear(40, 8)
    )
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    spec = OptimizerSpec(0.05, "constant", 0, 10, (0.9, 0.999), 1e-8, 0.0, 1.0, for_engine(f"zero{stage}"))
    engine, _ = start_engine(model, spec, torch.float32)
    offload = Offload(engine)
    rows, losses, kinds = torch.randn(16, 8), [], set()
    for _ in range(4):
        loss = engine(rows).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if moved:
            offload.away(weights=True, optimizer=stage < 3)
            kinds |= {state.value for state in engine.optimizer.offloaded_states}
            offload.back()
    distributed.destroy_process_group()
    return losses, sorted(kinds)


def _run(*arguments: Any) -> tuple[list[float], list[str]]:
    # DeepSpeed and torch.distributed are one a process.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_losses, *arguments).result(timeout=240)


@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_as_if_nothing_had_moved(stage: int) -> None:
    stayed, _ = _run(stage, False)
    moved, kinds = _run(stage, True)
    assert "lp_params" in kinds
    assert moved == stayed
    assert moved[-1] < moved[0]
