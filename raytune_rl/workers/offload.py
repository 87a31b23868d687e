"""A rank's weights and optimizer state, moved off the GPU while somebody else needs it, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Offload:
    """Moves what DeepSpeed holds, and the frozen weights that it does not know of.

    Below ZeRO-3 DeepSpeed's own moving ends at what is trained: of a model with an adapter that is the least
    of it. Frozen weights never change, so they are copied to the CPU once and from then on only dropped.

    Args:
        engine: A DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._frozen = [
            p for p in engine.module.parameters() if not p.requires_grad and not hasattr(p, "ds_id")
        ]
        self._copies: list[Tensor] = []
        self._device: torch.device | None = None

    def away(self, weights: bool, optimizer: bool) -> None:
        """To the CPU: the weights, the optimizer's state, or both."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if weights and self._frozen:
            self._device = self._frozen[0].device
            if not self._copies:
                # Of the plain data: a quantised parameter would move its scales along, and only one way.
                self._copies = [_on_cpu(parameter.data) for parameter in self._frozen]
            for parameter, copy in zip(self._frozen, self._copies, strict=True):
                parameter.data = copy
        moved = [State.optim_states, State.hp_params] if optimizer else []
        moved += [State.lp_params, State.lp_grads, State.contiguous_grad_buffer] if weights else []
        self._engine.offload_states(include=moved)  # frees what nothing refers to any more, too

    def back(self) -> None:
        """Everything that was moved."""
        if self._device is not None:
            for parameter, copy in zip(self._frozen, self._copies, strict=True):
                parameter.data = copy.to(self._device)
            self._device = None
        self._engine.reload_states()


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy from which the way back is fast."""
    copy = tensor.to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy
