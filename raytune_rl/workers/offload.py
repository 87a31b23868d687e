"""A rank's weights and optimizer state, moved off the GPU while somebody else needs it, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Frozen:
    """Weights that nobody trains: copied to the CPU once, and from then on only dropped, until they change.

    Args:
        tensors: They. Under ZeRO-3 a rank's share of each (`ds_tensor`).
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies: list[Tensor] = []
        self._device: torch.device | None = None

    def away(self) -> None:
        """To the CPU."""
        if self._device is not None or not self._tensors:
            return
        self._device = self._tensors[0].device
        if not self._copies:
            # Of the plain data: a quantised parameter would move its scales along, and only one way.
            self._copies = [_on_cpu(tensor.data) for tensor in self._tensors]
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def back(self) -> None:
        """To where they were."""
        if self._device is None:
            return
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy.to(self._device, copy=True)
        self._device = None

    def changed(self) -> None:
        """They were written to. What is away was changed there; what is not has no copy any more."""
        if self._device is None:
            self._copies = []


class Offload:
    """Moves what DeepSpeed holds, and the frozen weights that it does not know of.

    DeepSpeed's own moving ends at what is trained: of a model with an adapter that is the least of it.

    Args:
        engine: A DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        self._frozen = Frozen(p.ds_tensor if hasattr(p, "ds_id") else p for p in frozen)
        self._moved = False

    def away(self, weights: bool, optimizer: bool) -> None:
        """To the CPU: the weights, the optimizer's state, or both; of neither, only the allocator's cache."""
        if not (weights or optimizer):
            empty_cache()
            return
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if weights:
            self._frozen.away()
        moved = [State.optim_states, State.hp_params] if optimizer else []
        moved += [State.lp_params, State.lp_grads, State.contiguous_grad_buffer] if weights else []
        with _what_is_trained(self._engine.optimizer):
            self._engine.offload_states(include=moved)
        self._moved = True
        empty_cache()

    def back(self) -> None:
        """Everything that was moved."""
        self._frozen.back()
        if self._moved:
            self._engine.reload_states()
            self._moved = False


@contextmanager
def _what_is_trained(optimizer: Any) -> Iterator[None]:
    """ZeRO-3 lays all parameters of its module over a buffer that has the trained ones alone, in the order of
    its groups (DeepSpeed 0.19.8, `runtime/zero/stage3.py`, `offload_states`): shown those, it is right.
    """
    if not hasattr(optimizer, "lp_param_buffer"):
        yield
        return
    module = optimizer.module
    trained = [parameter for group in optimizer.fp16_groups for parameter in group]
    optimizer.module = SimpleNamespace(parameters=lambda: iter(trained))
    try:
        yield
    finally:
        optimizer.module = module


def empty_cache() -> None:
    """Gives back what the allocator keeps of freed memory; to this process it is free either way, but not to
    those that share its GPU.
    """
    import torch  # not above: a driver names the classes of its workers and needs no torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy from which the way back is fast."""
    copy = tensor.to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy
