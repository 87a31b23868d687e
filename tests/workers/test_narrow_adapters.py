"""Adapters in bfloat16, as on a GPU: float32 master weights learn what float32 adapters do."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.tiny.model import make_tiny_model


def _run(path: str, narrow: bool, dora: bool, bits: int | None) -> dict[str, Any]:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import torch
    from torch import distributed

    from raytune_rl.config.deepspeed import for_engine
    from raytune_rl.models.load import Quantization, load_model
    from raytune_rl.models.scorer import TokenScorer
    from raytune_rl.models.tuner import apply_tuner, narrow_adapters
    from raytune_rl.models.weights import WeightExporter
    from raytune_rl.protocol.model import TunerSettings
    from raytune_rl.protocol.train import OptimizerSpec
    from raytune_rl.workers.engine import start_engine

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    quantization = None if bits is None else Quantization(bits=bits)
    loaded = load_model(path, dtype="bfloat16", quantization=quantization).model
    model = apply_tuner(loaded, TunerSettings(lora_dropout=0.0, use_dora=dora)).model
    if narrow:
        narrow_adapters(model, torch.bfloat16)
    index = WeightExporter(TokenScorer(model), "adapter").index
    spec = OptimizerSpec(1e-2, "constant", 0, 9, (0.9, 0.95), 1e-8, 0.0, 1.0, for_engine("zero2"))
    engine, _ = start_engine(TokenScorer(model), spec, torch.bfloat16)
    ids = torch.randint(0, 200, (4, 24))
    positions = torch.arange(24).expand(4, 24)
    places = torch.arange(4 * 24).view(4, 24)[:, :-1].reshape(-1)
    losses = []
    for _ in range(12):
        loss = -engine(ids, positions, torch.ones_like(ids), places, ids[:, 1:].reshape(-1)).logprobs.mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    masters = [p for group in engine.optimizer.optimizer.param_groups for p in group["params"]]
    distributed.destroy_process_group()
    return {
        "losses": losses,
        "trained": {str(p.dtype) for p in trained},
        "masters": {str(p.dtype) for p in masters},
        "head": str(engine.module.model.get_output_embeddings().weight.dtype),
        "published": {entry.dtype for entry in index},
    }


def run(path: Path, narrow: bool, dora: bool = False, bits: int | None = None) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # DeepSpeed's world is one a process
        return pool.submit(_run, str(path), narrow, dora, bits).result(timeout=240)


@pytest.mark.variants
def test_they_learn_the_same_with_masters(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    wide, narrow = run(model, False), run(model, True)
    assert (wide["trained"], wide["published"]) == ({"torch.float32"}, {"float32"})
    assert narrow["trained"] == {"torch.bfloat16"}
    assert narrow["published"] == {"bfloat16"}
    assert narrow["masters"] == wide["masters"] == {"torch.float32"}
    assert wide["losses"][-1] < 0.8 * wide["losses"][0]
    assert narrow["losses"] == pytest.approx(wide["losses"], rel=0.03, abs=0.02)


def test_magnitudes_stay_wide(tmp_path: Path) -> None:
    assert run(make_tiny_model(tmp_path), True, dora=True)["trained"] == {"torch.float32"}


def test_what_peft_made_wide_of_a_quantised_base_is_narrow_again(tmp_path: Path) -> None:
    found = run(make_tiny_model(tmp_path), True, bits=4)
    assert found["trained"] == {"torch.bfloat16"}
    assert found["head"] == "torch.bfloat16", "PEFT turns it to float32, and every state with it"
    assert found["losses"][-1] < 0.8 * found["losses"][0]
