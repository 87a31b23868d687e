"""Floating-point operations of a training step, and what GPUs can do of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L20": 119.5e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 operations a second, from NVIDIA's data sheets, by what a device's name contains."""


def peak_of(device: str) -> float | None:
    """Of a device by its name; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


@dataclass(frozen=True)
class Shape:
    """The matrices of a decoder.

    Attributes:
        linear: Weights of the linear layers that a token passes, without the head.
        layers: Decoder layers.
        attention: Width of a layer's queries.
        hidden, vocabulary: Of the head.
    """

    linear: int
    layers: int
    attention: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """A dense decoder's, from its Transformers config: attention has four projections, the MLP three."""
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
        layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
        layers = text.num_hidden_layers
        return cls(layer * layers, layers, queries, text.hidden_size, text.vocab_size)


def forward(shape: Shape, lengths: Sequence[int], scored: int, causal: bool = True) -> float:
    """Operations of a forward pass: two for a weight and a token, and two products of attention whose size is
    the square of a row, half of it where a token looks back only (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
        shape: Of the model.
        lengths: Tokens of each row.
        scored: Tokens whose logits are computed.
        causal: Kernels leave out what is masked.
    """
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    attention = 4.0 * shape.layers * shape.attention * pairs
    return 2.0 * shape.linear * sum(lengths) + attention + 2.0 * shape.hidden * shape.vocabulary * scored


def step(
    shape: Shape, lengths: Sequence[int], scored: int, *, frozen: bool = False, causal: bool = True
) -> float:
    """Operations of forward and backward, without what is recomputed (so that the ratio to a device's peak is
    "model FLOPs utilisation").

    Args:
        shape, lengths, scored, causal: As in `forward`.
        frozen: The weights have no gradient (LoRA): of a product's two in the backward one is left. Attention
            has no weights, and both.
    """
    once = forward(shape, lengths, scored, causal)
    weights = 2.0 * shape.linear * sum(lengths) + 2.0 * shape.hidden * shape.vocabulary * scored
    return 3 * once - (weights if frozen else 0.0)


def mfu(operations: float, seconds: float, device: str) -> float | None:
    """The share of a device's peak that was used; None where that is not known."""
    peak = peak_of(device)
    return None if peak is None else operations / seconds / peak
