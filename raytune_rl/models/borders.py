"""Where packed rows begin, in the arguments that Transformers passes on to the kernels of layers which
position ids do not reach: linear attention, convolutions, state spaces.

The names and types are those of `DataCollatorWithFlattening`, return_flash_attn_kwargs and return_seq_idx.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def borders_of(position_ids: Tensor) -> dict[str, Any]:
    """The arguments for one pack.

    Args:
        position_ids: int64 [1, T], 0 at the beginning of each row.
    """
    begins = position_ids[0] == 0
    total = position_ids.shape[1]
    edges = torch.cat([begins.nonzero()[:, 0], begins.new_tensor([total], dtype=torch.long)]).int()
    longest = int(edges.diff().max())
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": (begins.cumsum(0) - 1).int()[None],
    }


def accepts_borders(backbone: nn.Module) -> bool:
    """Whether a model passes arguments on to its layers that it does not read itself."""
    parameters = inspect.signature(backbone.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
