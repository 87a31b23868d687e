"""Rotary positions in vLLM on a CPU, for models that give their heads as a dimension of their own.

vLLM's operator there takes the last dimension for all heads side by side. LFM2 and models with latent
attention (DeepSeek-V3) give [tokens, heads, width]: of those it turns the first head only, and says nothing.
"""

from __future__ import annotations

from torch import Tensor

_DONE = "_raytune_rl_turns_every_head"


def turn_every_head() -> None:
    """From now on it is given them side by side, in this process; called again, it does nothing."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    plain = RotaryEmbedding.forward_cpu
    if getattr(plain, _DONE, False):
        return

    def forward_cpu(
        self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if query.ndim != positions.ndim + 2:
            return plain(self, positions, query, key)
        flat_key = None if key is None else key.flatten(-2)
        turned, turned_key = plain(self, positions, query.flatten(-2), flat_key)
        return turned.view(query.shape), None if key is None else turned_key.view(key.shape)

    setattr(forward_cpu, _DONE, True)
    RotaryEmbedding.forward_cpu = forward_cpu
