"""The weight store: versions of the policy's weights in the object store, for anybody to pull at any time.

A version is a few *buckets*. A bucket is one object: flat uint8 arrays that hold its tensors' bytes one after
another, and an index that says what they are. Ray serialises the arrays outside the pickle, so publishing is
one copy into shared memory and reading is a mapping. Tensors that are neighbours in memory, as DeepSpeed
keeps them, share an array, because few arrays are copied faster than many. The buckets are the return values
of the policy workers' own method, which makes the controller their owner: they outlive the worker that made
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError

from raytune_rl.errors import StaleWeightsError
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.cluster import NAMESPACE
from raytune_rl.runtime.weight_delta import decode

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 512 * 2**20
"""Aim for a bucket's size: large enough that calls do not matter, well under the 2 GiB where objects get
slow.
"""

BACK_WITHIN_S = 60.0
"""Seconds that a lost weight store may take to be there again, with the newest version."""

PLAIN_BYTES = 2**20
"""Up to here Ray copies an array as it is; for each larger one it starts six threads."""

LONG_BYTES = 32 * 2**20
"""From here on those threads cost less than the copying does."""


class _Measured(Protocol):
    @property
    def nbytes(self) -> int: ...


def plan_buckets(entries: Sequence[_Measured], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Cuts tensors into consecutive buckets of about `bucket_bytes`; a larger tensor gets one of its own."""
    buckets: list[list[int]] = []
    size = 0
    for position, entry in enumerate(entries):
        if not buckets or size + entry.nbytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(position)
        size += entry.nbytes
    return buckets


def to_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """A tensor's memory as flat uint8; a view where the tensor is a contiguous CPU tensor."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()


def to_arrays(tensors: Iterable[torch.Tensor]) -> list[NDArray[np.uint8]]:
    """A bucket's arrays: the tensors' bytes in their order. Neighbours in memory share an array if they are
    long together, or if together they are still so small that Ray copies them without threads.
    """
    runs: list[list[torch.Tensor]] = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        if runs and _follows(runs[-1][-1], flat):
            runs[-1].append(flat)
        else:
            runs.append([flat])
    arrays = []
    for run in runs:
        long = sum(flat.nbytes for flat in run) >= LONG_BYTES
        parts = [run] if long else [[run[i] for i in part] for part in plan_buckets(run, PLAIN_BYTES)]
        arrays += [to_bytes(p[0].as_strided((sum(flat.numel() for flat in p),), (1,))) for p in parts]
    return arrays


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a flat tensor begins where another ends, in the same memory and of the same type."""
    return (
        second.dtype == first.dtype
        and second.storage_offset() == first.storage_offset() + first.numel()
        and second.untyped_storage()._cdata == first.untyped_storage()._cdata
    )


def from_bytes(data: NDArray[np.uint8], entry: TensorEntry) -> torch.Tensor:
    """The tensor of a bucket's array, sharing its (read-only) memory."""
    import warnings

    import torch

    dtype = getattr(torch, entry.dtype)
    if not data.size:  # numpy gives it no stride, and torch then cannot view it as another type
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        flat = torch.from_numpy(data)
    return flat.view(dtype).reshape(entry.shape)


def read(manifest: Manifest, timeout_s: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields `(name, tensor)` of a version, bucket after bucket; tensors are read-only maps of shared
    memory, but for a bucket that is a difference: what it stands on is copied, and changed. While a bucket is
    loaded the next one comes from its node.
    """
    refs = [
        [ref] if delta is None else [ref, delta.base]
        for ref, delta in zip(manifest.buckets, manifest.bases, strict=True)
    ]
    following = [*refs, []][1:]
    for own, then, entries in zip(refs, following, manifest.index, strict=True):
        arrays, *base = [ray.get(ref, timeout=timeout_s) for ref in own]
        if then:
            ray.wait(then, timeout=0)  # begins to fetch it, and waits for nothing
        yield from split([decode(base[0], arrays)] if base else arrays, entries)


def split(
    arrays: Sequence[NDArray[np.uint8]], entries: Sequence[TensorEntry]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A bucket's tensors by name, sharing its memory; each lies within one array.

    Raises:
        ValueError: The arrays hold more or fewer bytes than the entries.
    """
    sizes = [entry.nbytes for entry in entries]
    if sum(sizes) != sum(array.nbytes for array in arrays):
        raise ValueError(f"a bucket of {sum(a.nbytes for a in arrays)} bytes for tensors of {sum(sizes)}")
    left = iter(arrays)
    array, at = np.empty(0, dtype=np.uint8), 0
    for entry, size in zip(entries, sizes, strict=True):
        while size and at == array.size:
            array, at = next(left), 0
        yield entry.name, from_bytes(array[at : at + size], entry)
        at += size


class WeightStore:
    """An actor that knows which versions exist. It holds references, never weights.

    Args:
        keep: Versions to keep: the newest, and those that a worker may still be reading.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._manifests: dict[int, Manifest] = {}

    def ping(self) -> None:
        """Proves that it is there."""

    def publish(self, manifest: Manifest) -> int:
        """Makes a version known; versions only count up.

        Raises:
            StaleWeightsError: The version is not newer than the newest.
        """
        newest = max(self._manifests, default=-1)
        if manifest.version <= newest:
            raise StaleWeightsError(f"weight version {manifest.version} was published after version {newest}")
        self._manifests[manifest.version] = manifest
        for old in sorted(self._manifests)[: -self._keep]:
            del self._manifests[old]
        return manifest.version

    def get(self, version: int | None = None) -> Manifest | None:
        """The manifest of a version, or of the newest; None where nothing was published, or not again since
        the store was started anew.

        Raises:
            StaleWeightsError: The version is not (or no longer) there.
        """
        if not self._manifests:
            return None
        wanted = max(self._manifests, default=-1) if version is None else version
        if wanted not in self._manifests:
            raise StaleWeightsError(
                f"weight version {wanted} is not in the store, which has {sorted(self._manifests)}"
            )
        return self._manifests[wanted]


def start_store(name: str, keep: int = 2) -> ray.actor.ActorHandle:
    """Starts a weight store under a name, by which any process of the cluster finds it; see `WeightStore`."""
    return (
        ray.remote(WeightStore)
        .options(name=name, namespace=NAMESPACE, num_cpus=0, max_concurrency=8)
        .remote(keep)
    )


def find_manifest(store_name: str, version: int | None, timeout_s: float) -> Manifest:
    """Asks the named store for a version (None: the newest) from any process connected to the cluster. A
    store that is gone is waited for: whoever publishes starts it anew.

    Raises:
        StaleWeightsError: The version is not there, or nothing is.
    """
    deadline = time.monotonic() + min(timeout_s, BACK_WITHIN_S)
    while True:
        manifest = None
        with suppress(ValueError, RayActorError):  # nobody has the name, or who had it has died
            store = ray.get_actor(store_name, namespace=NAMESPACE)
            manifest = ray.get(store.get.remote(version), timeout=timeout_s)
        if manifest is not None:
            return manifest
        if time.monotonic() > deadline:
            raise StaleWeightsError(f"the weight store {store_name} has no version at all")
        time.sleep(0.2)


def collect_index(
    parts: Iterable[tuple[tuple[TensorEntry, ...], ...]],
) -> tuple[tuple[TensorEntry, ...], ...]:
    """Joins the ranks' bucket indices in rank order."""
    return tuple(bucket for part in parts for bucket in part)
