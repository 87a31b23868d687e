"""The arithmetic of MFU, beside what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import flops
from benchmarks.gpu import SHAPES, Found, Settings, rows_of

ROWS, LENGTH = 3, 32


def counted(frozen: bool) -> tuple[float, float]:
    """Operations of forward and of both passes, by torch: attention in full, every token scored."""
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPES["tiny"], attn_implementation="eager"))
    if frozen:
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        model.lm_head = torch.nn.Linear(64, 512, bias=False).requires_grad_(False)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as once:
        loss = model(ids, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return once.get_total_flops(), once.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
def test_as_many_as_torch_counts(frozen: bool) -> None:
    shape = flops.Shape.of(Qwen2Config(**SHAPES["tiny"]))
    once, both = counted(frozen)
    lengths, scored = [LENGTH] * ROWS, ROWS * LENGTH
    # torch counts the product that makes rotary angles too.
    assert flops.forward(shape, lengths, scored, causal=False) == pytest.approx(once, rel=5e-3)
    assert flops.step(shape, lengths, scored, frozen=frozen, causal=False) == pytest.approx(both, rel=5e-3)


def test_a_token_that_looks_back_only_costs_half_of_attention() -> None:
    shape = flops.Shape(linear=0, layers=2, attention=8, hidden=0, vocabulary=0)
    assert flops.forward(shape, [3, 1], 0) == 4 * 2 * 8 * (6 + 1)
    assert flops.forward(shape, [3, 1], 0, causal=False) == 4 * 2 * 8 * (9 + 1)


def test_the_7b_has_as_many_weights_as_its_card_says() -> None:
    shape = flops.Shape.of(Qwen2Config(**SHAPES["7b"]))
    assert shape.linear / 1e9 == pytest.approx(6.53, abs=0.01)
    assert flops.step(shape, [1], 0) / shape.linear == pytest.approx(6, rel=1e-3)


def test_a_share_of_what_a_device_can() -> None:
    assert flops.mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert flops.mfu(756e12, 1.0, "NVIDIA H100 PCIe") == 1.0
    assert flops.mfu(1.0, 1.0, "CPU") is None


def test_the_table_leaves_out_the_first_of_several() -> None:
    found = Found("NVIDIA H200", operations=989e11)
    found.seconds = {"load": [3.0], "forward and backward": [9.0, 1.0, 1.0]}
    found.cpu = {"load": [2.5], "forward and backward": [9.0, 0.25, 0.25]}
    found.memory = {"load": 2.0, "forward and backward": 20.5}
    assert rows_of(found, Settings(tokens=4096, row=1024)) == [
        ["load", "3.000", "2.500", "2.00", "", ""],
        ["forward and backward", "1.000", "0.250", "20.50", "4,096", "98.90 (10%)"],
    ]
