"""LoRA in vLLM on a CPU, where all tokens of a step have the same adapter, as a policy's samples do.

vLLM's operators there (`vllm.lora.ops.torch_ops`) copy both matrices of the adapter for every token before
they multiply, which takes longer than the model itself as soon as prompts are read. With one adapter for all,
a plain product of two matrices gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiply_once() -> None:
    """From now on vLLM's operators do that in this process; with several adapters they do as before."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for faster in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        name = faster.__name__
        _PLAIN.setdefault(name, getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, faster)


_PLAIN: dict[str, Any] = {}
"""vLLM's own operators."""


def bgmv_shrink(
    inputs: Tensor, weights: Tensor, output: Tensor, adapters: Tensor, scaling: float = 1.0
) -> None:
    """`output[:, :rank] = scaling * inputs @ A^T`; arguments as in vLLM, `adapters` one a row of `inputs`."""
    matrix = only_one(weights, adapters, output.dtype)
    if matrix is None:
        return _PLAIN["bgmv_shrink"](inputs, weights, output, adapters, scaling)
    made = inputs.to(output.dtype) @ matrix.T
    output[:, : made.shape[1]] = scaling * made
    return None


def bgmv_expand(
    inputs: Tensor, weights: Tensor, output: Tensor, adapters: Tensor, add_inputs: bool = True
) -> None:
    """`output = inputs @ B^T`, or added to it; what one of them is wider is left out."""
    width = min(weights.shape[-2], output.shape[1])
    matrix = only_one(weights, adapters, output.dtype)
    if matrix is None or len(inputs) != len(output):
        return _PLAIN["bgmv_expand"](inputs, weights, output, adapters, add_inputs)
    return _put(inputs, matrix[:width], output[:, :width], add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output: Tensor,
    adapters: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same into `slice_size` columns of `output` from `slice_offset` on."""
    matrix = only_one(weights, adapters, output.dtype)
    if matrix is None:
        return _PLAIN["bgmv_expand_slice"](
            inputs, weights, output, adapters, slice_offset, slice_size, add_inputs
        )
    return _put(inputs, matrix, output[:, slice_offset : slice_offset + slice_size], add_inputs)


def _put(inputs: Tensor, matrix: Tensor, columns: Tensor, add_inputs: bool) -> None:
    made = inputs.to(columns.dtype) @ matrix.T
    if add_inputs:
        columns += made
    else:
        columns[:] = made


def only_one(weights: Tensor, adapters: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The matrix that all rows share, `[out, in]`; None if they have several, or some of them none (-1).

    Args:
        weights: `[adapters, out, in]`, or `[adapters, 1, out, in]`.
        adapters: Its first index, for each row.
        dtype: Of the matrix.
    """
    if not len(adapters):
        return None
    first = int(adapters[0])
    if first < 0 or not bool((adapters == first).all()):
        return None
    matrix = weights[first]
    return (matrix.squeeze(0) if matrix.ndim == 3 else matrix).to(dtype)
