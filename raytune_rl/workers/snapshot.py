"""A rank's whole state as a few flat arrays for the object store, and back, bit by bit.

It is what a checkpoint holds (`optimizer_state`), for a world of the same size: master weights, AdamW's
moments and step, the loss scale, and the state of the random numbers. Learning rate and dropout follow from
the number of the step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.weights import split, to_arrays
from raytune_rl.workers import optimizer_state


def take(engine: Any) -> tuple[SnapshotPart, list[NDArray[np.uint8]]]:
    """What is this rank's, as it is now; the arrays may share the engine's memory."""
    began = time.perf_counter()
    tensors = {name: tensor.detach().cpu() for name, tensor in optimizer_state.parts(engine).items()}
    part = SnapshotPart(
        entries=tuple(TensorEntry.of(name, tensor) for name, tensor in tensors.items()),
        loss_scale=optimizer_state.loss_scale(engine),
        random=_random(),
        seconds=time.perf_counter() - began,
    )
    return part, to_arrays(tensors.values())


def put_back(engine: Any, part: SnapshotPart, arrays: list[NDArray[np.uint8]]) -> None:
    """Makes the rank what it was. All ranks at once."""
    tensors = dict(split(arrays, part.entries))

    def fill(name: str, target: Tensor) -> None:
        source = tensors.get(name)
        if source is None:  # no step was made yet
            target.zero_()
        else:
            target.copy_(source.view(target.shape))

    optimizer_state.put_back(engine, fill, part.loss_scale)
    torch.set_rng_state(torch.from_numpy(part.random[0].copy()))
    if len(part.random) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(part.random[1].copy()))


def _random() -> tuple[NDArray[np.uint8], ...]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return tuple(state.numpy().copy() for state in states)
