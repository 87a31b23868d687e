"""vLLM's rotary positions on a CPU, of heads as a dimension of their own."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from raytune_rl.workers.vllm_rotary import turn_every_head

TOKENS, HEADS, KEY_HEADS, WIDTH = 5, 4, 2, 8


@pytest.mark.parametrize("contiguous", [True, False])
def test_every_head_is_turned_and_none_in_place_of_another(contiguous: bool) -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    turn_every_head()
    turn_every_head()
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(WIDTH, WIDTH, 32, 10000, is_neox_style=True, dtype=torch.float32)
    positions = torch.tensor([0, 3, 4, 9, 31])
    wide = torch.randn(TOKENS, HEADS, 2 * WIDTH)
    query = wide[..., WIDTH:].contiguous() if contiguous else wide[..., WIDTH:]
    key = torch.randn(TOKENS, KEY_HEADS, WIDTH)
    expected, expected_key = rotary.forward_native(
        positions, query.reshape(TOKENS, -1).clone(), key.reshape(TOKENS, -1).clone()
    )
    turned, turned_key = rotary.forward_cpu(positions, query, key)
    torch.testing.assert_close(turned, expected.view(TOKENS, HEADS, WIDTH))
    torch.testing.assert_close(turned_key, expected_key.view(TOKENS, KEY_HEADS, WIDTH))
