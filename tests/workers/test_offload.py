"""Weights that go to the CPU and come back are the same, also where ZeRO-3 has cut up frozen ones."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from raytune_rl.workers.offload import Frozen


def _losses(stage: int) -> tuple[list[float], list[float], set[str]]:
    """Losses of some steps of layers of which two are frozen: as they stay, as they are moved after each
    step, and what was moved then.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch
    from torch import distributed, nn

    from raytune_rl.config.deepspeed import for_engine
    from raytune_rl.protocol.train import OptimizerSpec
    from raytune_rl.workers.engine import start_engine
    from raytune_rl.workers.offload import Offload

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    spec = OptimizerSpec(0.05, "constant", 0, 10, (0.9, 0.999), 1e-8, 0.0, 1.0, for_engine(f"zero{stage}"))

    def losses(moves: bool) -> tuple[list[float], set[str]]:
        torch.manual_seed(0)
        # Vectors and matrices are groups of their own: the groups' order is not the module's.
        widths = [nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 40), nn.Linear(40, 8)]
        model = nn.Sequential(*widths)
        model[0].requires_grad_(False)
        model[3].requires_grad_(False)
        engine, _ = start_engine(model, spec, torch.float32)
        offload = Offload(engine)
        rows, found, kinds = torch.randn(16, 8), [], set()
        for _ in range(4):
            loss = engine(rows).square().mean()
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
            if moves:
                offload.away(weights=True, optimizer=stage < 3)
                kinds |= {state.value for state in engine.optimizer.offloaded_states}
                offload.back()
        return found, kinds

    stayed, _ = losses(moves=False)
    moved, kinds = losses(moves=True)
    distributed.destroy_process_group()
    return stayed, moved, kinds


@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_as_if_nothing_had_moved(stage: int) -> None:
    # DeepSpeed and torch.distributed are one a process.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        stayed, moved, kinds = pool.submit(_losses, stage).result(timeout=240)
    assert "lp_params" in kinds
    assert moved == stayed
    assert moved[-1] < moved[0]


def test_frozen_weights_that_change_are_copied_anew() -> None:
    import torch

    weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    frozen = Frozen([weight])
    frozen.away()
    weight.data += 1  # as a reference that moves is mixed where it lies
    frozen.back()
    frozen.away()
    frozen.back()
    assert weight.tolist() == [1.0] * 4
    weight.data += 1
    frozen.changed()
    frozen.away()
    assert weight.tolist() == [2.0] * 4
    frozen.back()
    assert weight.tolist() == [2.0] * 4
