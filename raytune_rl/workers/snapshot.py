"""A rank's whole state as a few flat arrays for the object store, and back, bit by bit.

It is what a checkpoint holds (`optimizer_state`), for a world of the same size: master weights, AdamW's
moments and step, the loss scale, and the state of the random numbers. Learning rate and dropout follow from
the number of the step. So it can be written as a checkpoint's optimizer state, too, by whoever holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.weights import split, to_arrays
from raytune_rl.workers import optimizer_state
from raytune_rl.workers.saving import writing


def take(engine: Any, world_size: int) -> tuple[SnapshotPart, list[NDArray[np.uint8]]]:
    """What is this rank's, as it is now; the arrays may share the engine's memory."""
    began = time.perf_counter()
    tensors = {name: tensor.detach().cpu() for name, tensor in optimizer_state.parts(engine).items()}
    tensors |= {name: get() for name, (get, _) in _generators().items()}
    part = SnapshotPart(
        entries=tuple(TensorEntry.of(name, tensor) for name, tensor in tensors.items()),
        index=optimizer_state.index_of(engine, world_size),
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

    optimizer_state.put_back(engine, fill, part.index[optimizer_state.SCALE])
    for name, (_, put) in _generators().items():
        put(tensors[name].clone())


def write(part: SnapshotPart, arrays: list[NDArray[np.uint8]], directory: str, rank: int) -> None:
    """Writes a rank's part as the optimizer state of a checkpoint, where the rank itself no longer can."""
    tensors = dict(split(arrays, part.entries))
    own = {name: tensor.clone() for name, tensor in tensors.items() if name not in _generators()}
    with writing(directory):
        optimizer_state.write(own, part.index, Path(directory), rank)


def _generators() -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """The random numbers of this process: by name, how their state is read and set."""
    both: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = {
        "random.cpu": (torch.get_rng_state, torch.set_rng_state)
    }
    if torch.cuda.is_available():
        both["random.gpu"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return both
