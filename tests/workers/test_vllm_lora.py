"""LoRA on a CPU multiplies once for all tokens, and gives what vLLM's own operators give."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from raytune_rl.workers import vllm_lora

NAMES = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
ROWS, IN, RANK, OUT, ADAPTERS = 5, 12, 4, 6, 2


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lora_ops, punica_cpu):
        for name in NAMES:
            monkeypatch.setattr(module, name, getattr(lora_ops, name))  # put back afterwards
    vllm_lora.multiply_once()


@pytest.mark.parametrize("adapters", [[1] * ROWS, [0, 1, 0, 1, 1], [-1, 1, 1, 1, 1]])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_the_operators_give_what_vllms_own_give(adapters: list[int], stacked: bool, adds: bool) -> None:
    torch.manual_seed(0)
    shape = (ADAPTERS, 1) if stacked else (ADAPTERS,)
    a, b = torch.randn(*shape, RANK, IN), torch.randn(*shape, OUT, RANK)
    inputs, small, index = torch.randn(ROWS, IN), torch.randn(ROWS, RANK), torch.tensor(adapters)
    calls = (
        ("bgmv_shrink", (inputs, a), torch.zeros(ROWS, RANK), (0.5,)),
        ("bgmv_expand", (small, b), torch.randn(ROWS, OUT + 2), (adds,)),
        ("bgmv_expand", (small, b), torch.randn(ROWS, OUT - 2), (adds,)),
        ("bgmv_expand_slice", (small, b), torch.randn(ROWS, OUT + 3), (2, OUT, adds)),
    )
    for name, given, output, more in calls:
        ours, theirs = output.clone(), output.clone()
        getattr(punica_cpu, name)(*given, ours, index, *more)
        vllm_lora._PLAIN[name](*given, theirs, index, *more)
        torch.testing.assert_close(ours, theirs, msg=name)


def test_prompts_go_the_same_way() -> None:
    seen: list[int] = []
    weights = torch.randn(1, RANK, IN)
    output = torch.zeros(ROWS, RANK)
    lengths, first = torch.tensor([2, 3]), torch.tensor([0, 0])
    real, vllm_lora._PLAIN["bgmv_shrink"] = vllm_lora._PLAIN["bgmv_shrink"], lambda *_: seen.append(1)
    try:
        lora_ops.sgmv_shrink(
            torch.randn(ROWS, IN), weights, output, torch.tensor([0, 2]), lengths, first, 2, 3, ROWS, 1.0
        )
    finally:
        vllm_lora._PLAIN["bgmv_shrink"] = real
    assert not seen
    assert output.abs().sum() > 0
