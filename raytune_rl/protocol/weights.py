"""The parts of a published version of the weights."""

from __future__ import annotations

import re
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
    def itemsize(self) -> int:
        """Bytes of an element: torch's names tell its bits, and the driver does without torch."""
        bits = re.search(r"\d+", self.dtype)
        return 1 if bits is None else max(int(bits[0]) // 8, 1)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class DeltaOn:
    """What a bucket that is a difference stands on.

    Attributes:
        base: Reference to the bucket of an older version, which is whole. Whoever has the manifest keeps it.
        nbytes: Size of the difference.
    """

    base: Any
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """One published version.

    Attributes:
        version: Counts up from 0.
        kind: "full" (every tensor of the model; LoRA already merged) or "adapter" (LoRA tensors alone).
        buckets: References to lists of flat uint8 arrays, or to differences (`runtime.weight_delta`).
        index: The entries of each bucket, in the order of their bytes in its arrays.
        adapter_config: PEFT's configuration as JSON text, for kind "adapter".
        deltas: By bucket, what it stands on; None for one that is whole. Empty: all are.
    """

    version: int
    kind: str
    buckets: tuple[Any, ...]
    index: tuple[tuple[TensorEntry, ...], ...]
    adapter_config: str | None = None
    deltas: tuple[DeltaOn | None, ...] = ()

    @property
    def bases(self) -> tuple[DeltaOn | None, ...]:
        """`deltas`, one a bucket."""
        return self.deltas or (None,) * len(self.buckets)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for bucket in self.index for entry in bucket)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that were made for this version: of its differences, and of the buckets that are whole."""
        return sum(
            sum(entry.nbytes for entry in entries) if delta is None else delta.nbytes
            for entries, delta in zip(self.index, self.bases, strict=True)
        )

    @property
    def held_nbytes(self) -> int:
        """Bytes in the object store for its sake, with what it stands on."""
        return self.nbytes + sum(delta.nbytes for delta in self.deltas if delta is not None)
