"""The parts of a published version of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a bucket: its name in the Hugging Face checkpoint, torch dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorEntry:
        """The entry that describes a tensor."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        import torch

        return getattr(torch, self.dtype).itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Manifest:
    """One published version.

    Attributes:
        version: Counts up from 0.
        kind: "full" (every tensor of the model; LoRA already merged) or "adapter" (LoRA tensors alone).
        buckets: References to lists of flat uint8 arrays.
        index: The entries of each bucket, in the order of their bytes in its arrays.
        adapter_config: PEFT's configuration as JSON text, for kind "adapter".
    """

    version: int
    kind: str
    buckets: tuple[Any, ...]
    index: tuple[tuple[TensorEntry, ...], ...]
    adapter_config: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for bucket in self.index for entry in bucket)
