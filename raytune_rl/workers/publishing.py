"""A rank's part in publishing the policy's weights: which tensors it gives, and what they are now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.weight_delta import Delta, encode, unit_of
from raytune_rl.runtime.weights import plan_buckets, to_arrays

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_rl.models.weights import Gather, WeightExporter


UNTIED = (
    "the adapter changes the head or the embedding of a model that ties them (tie_word_embeddings), so they "
    "are two matrices now, but the engines have one. Leave them out of --target_modules and "
    "--modules_to_save; or merge an adapter of --adapters first, which writes a model that does not tie "
    "them: raytune-rl export --adapters ADAPTER --merge_lora true --output_dir MERGED; then --model MERGED"
)


class HostBuffer:
    """Memory of the host into which tensors of a GPU are copied: all at once, one after the other, into one
    block that is kept. Fresh pageable memory is several times slower to copy to, and each copy is waited for.

    Args:
        entries: What is copied, in the order in which it lies there.
        pinned: Whether the GPU copies into it by itself.
    """

    def __init__(self, entries: Sequence[TensorEntry], pinned: bool) -> None:
        import torch

        self._places: dict[str, Tensor] = {}
        starts, size = [], 0
        for entry in entries:
            size += -size % entry.itemsize
            starts.append(size)
            size += entry.nbytes
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for entry, start in zip(entries, starts, strict=True):
            part = block[start : start + entry.nbytes].view(getattr(torch, entry.dtype))
            self._places[entry.name] = part.view(entry.shape)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Begins to copy a tensor; it has arrived once the device is synchronised."""
        return self._places[name].copy_(tensor.detach(), non_blocking=True)


class Publisher:
    """Gives this rank's share of the published weights, bucket by bucket.

    Args:
        exporter: Makes the tensors.
        gather: Makes them whole where the engine cuts them up: then publishing is a collective.
        rank, world_size: The share.
        timeout_s: Deadline for reading what a difference would stand on.
    """

    def __init__(
        self, exporter: WeightExporter, gather: Gather, rank: int, world_size: int, timeout_s: float = 300.0
    ) -> None:
        self._exporter = exporter
        self._gather = gather
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._buffer: HostBuffer | None = None

    def index(self) -> tuple[tuple[TensorEntry, ...], ...]:
        """The buckets this rank publishes: each a tuple of entries. Ranks share the work bucket by bucket."""
        entries = list(self._exporter.index)
        # As `parameter_groups` has them, and so DeepSpeed in its flat buffers: neighbours travel together.
        entries.sort(key=lambda entry: len(entry.shape) < 2)
        buckets = plan_buckets(entries)
        self._share = [[entries[i] for i in bucket] for bucket in buckets[self._rank :: self._world_size]]
        return tuple(tuple(bucket) for bucket in self._share)

    def publish(self, bases: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The present weights.

        Args:
            bases: By bucket of `index`, a reference to that bucket of an older version, which is whole; None
                where this one must be, too. Empty: all of them.

        Returns:
            By bucket the bytes of its difference to the older one, None where it is whole because that one is
            lost or the difference would save less than half; then each bucket as a list of arrays, flat
            uint8 where it is whole.
        """
        import torch

        own = {entry.name: entry for bucket in self._share for entry in bucket}
        tensors: dict[str, Tensor] = {}
        # At once, because a sharded tensor is whole only here, and merged ones would fill a GPU.
        for name, tensor in self._exporter.tensors(set(own), self._gather):
            if TensorEntry.of(name, tensor) != own[name]:
                raise RuntimeError(f"weight {name} changed its shape or type since the index was made")
            if tensor.is_cuda:
                if self._buffer is None:
                    self._buffer = HostBuffer(list(own.values()), pinned=True)
                tensors[name] = self._buffer.take(name, tensor)
            else:
                tensors[name] = tensor.detach().cpu().contiguous()
        if self._buffer is not None:
            torch.cuda.synchronize()
        made = [
            self._made(bucket, [tensors[entry.name] for entry in bucket], base)
            for bucket, base in zip(self._share, bases or [None] * len(self._share), strict=True)
        ]
        return tuple(nbytes for nbytes, _ in made), *(arrays for _, arrays in made)

    def _made(
        self, entries: Sequence[TensorEntry], tensors: Sequence[Tensor], base: Any
    ) -> tuple[int | None, list[Any]]:
        """A bucket's difference and its bytes; or None and the whole bucket."""
        arrays = to_arrays(tensors)
        if base is not None and (delta := self._delta(entries, arrays, base)) is not None:
            return sum(array.nbytes for array in delta), delta
        return None, arrays

    def _delta(self, entries: Sequence[TensorEntry], arrays: Sequence[Any], base: Any) -> Delta | None:
        import ray
        from ray.exceptions import RayError

        try:
            old = ray.get(base, timeout=self._timeout_s)
        except RayError:
            return None
        return encode(old, arrays, unit_of(entries), sum(array.nbytes for array in arrays) // 2)


def adapter_config(model: Any) -> str:
    """The PEFT configuration of a model's adapter as JSON text, as in adapter_config.json."""
    from raytune_rl.models.unwrap import peft_model

    peft = peft_model(model)
    assert peft is not None
    config = peft.peft_config[str(peft.active_adapters[0])].to_dict()
    return json.dumps(config, default=_jsonable)


def _jsonable(value: Any) -> Any:
    """PEFT's configuration holds sets and enums."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
