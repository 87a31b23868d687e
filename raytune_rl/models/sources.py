"""Tensors of a model that can be made on demand, one at a time, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytune_rl.models.sharding import own_tensors, shape_of


@dataclass(frozen=True)
class Source:
    """A tensor that can be made on demand.

    Attributes:
        name: In the model.
        shape, dtype: Of the tensor.
        parts: What it is made from; the first tells apart what shares storage by tying. Under ZeRO-3
            they must be gathered while it is made.
        make: Makes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    make: Callable[[], Tensor]


def as_it_is(name: str, tensor: Tensor) -> Source:
    """A tensor of the model itself."""
    return Source(name, shape_of(tensor), tensor.dtype, (tensor,), tensor.detach)


def plain_sources(model: nn.Module) -> Iterator[Source]:
    """Every parameter and persistent buffer under its own name; tied ones appear under each of theirs."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for inner, tensor in own_tensors(module):
            yield as_it_is(prefix + inner, tensor)
