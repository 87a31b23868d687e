"""Weights as bytes, in buckets, in the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch

from raytune_rl.errors import StaleWeightsError
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.weights import (
    LONG_BYTES,
    PLAIN_BYTES,
    WeightStore,
    collect_index,
    find_manifest,
    from_bytes,
    plan_buckets,
    read,
    split,
    start_store,
    to_arrays,
    to_bytes,
)


def entries(*sizes: int) -> list[TensorEntry]:
    return [TensorEntry(f"w{i}", "uint8", (size,)) for i, size in enumerate(sizes)]


# -- buckets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4, 4, 4], [[0, 1], [2]]),
        ([4, 6, 1], [[0, 1], [2]]),
        ([4, 7], [[0], [1]]),
        ([1, 50, 1, 1], [[0], [1], [2, 3]]),
        ([0, 0, 0], [[0, 1, 2]]),
        ([10, 0, 10, 0], [[0, 1], [2, 3]]),
        ([], []),
    ],
)
def test_consecutive_tensors_fill_a_bucket(sizes: list[int], expected: list[list[int]]) -> None:
    assert plan_buckets(entries(*sizes), bucket_bytes=10) == expected


def test_every_tensor_is_in_one_bucket_and_none_is_too_large() -> None:
    sizes = np.random.default_rng(0).integers(0, 40, size=200).tolist()
    buckets = plan_buckets(entries(*sizes), bucket_bytes=64)
    assert [i for bucket in buckets for i in bucket] == list(range(200))
    assert max(sum(sizes[i] for i in bucket) for bucket in buckets) <= 64


def test_a_size_counts_bytes_not_elements() -> None:
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        name = str(dtype).removeprefix("torch.")
        assert TensorEntry("w", name, ()).itemsize == dtype.itemsize, name
    assert TensorEntry("w", "bfloat16", (3, 5)).nbytes == 30
    assert TensorEntry("w", "float32", ()).nbytes == 4
    assert TensorEntry("w", "float32", (0, 7)).nbytes == 0
    huge = TensorEntry("w", "float32", (2**17, 2**17))
    assert huge.nbytes == 2**36, "beyond 32 bits"


# -- bytes -------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0,), (4, 0, 2)], ids=str)
def test_bytes_there_and_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    entry = TensorEntry.of("layer.weight", tensor)
    data = to_bytes(tensor)
    assert (data.dtype, data.ndim, data.nbytes) == (np.uint8, 1, entry.nbytes)
    data.setflags(write=False)  # as the object store gives it
    again = from_bytes(data, entry)
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_bits_survive_that_numbers_would_not() -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40], dtype=torch.bfloat16)
    again = from_bytes(to_bytes(odd), TensorEntry.of("w", odd))
    assert torch.equal(again.view(torch.int16), odd.view(torch.int16))


def test_a_strided_tensor_is_written_in_its_own_order() -> None:
    tensor = torch.arange(12).reshape(3, 4).T
    assert torch.equal(from_bytes(to_bytes(tensor), TensorEntry.of("w", tensor)), tensor)


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.zeros(4)
    data = to_bytes(tensor)
    tensor[0] = 1.0
    assert data.any()
    assert from_bytes(data, TensorEntry.of("w", tensor)).data_ptr() == tensor.data_ptr()


def test_a_parameter_needs_no_detaching() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert to_bytes(parameter).nbytes == 8


# -- arrays ------------------------------------------------------------------------------------------------


def test_neighbours_in_memory_share_an_array() -> None:
    flat, other = torch.arange(20.0), torch.arange(6, dtype=torch.bfloat16)
    tensors = {
        "first": flat[:6].view(2, 3),
        "none": flat[6:6],
        "next": flat[6:10],
        "after a gap": flat[11:13],
        "turned": flat[13:19].view(2, 3).T,
        "back": flat[19:],
        "other": other[:3],
        "of another kind": other[3:].view(torch.int16),
    }
    arrays = to_arrays(tensors.values())
    assert [a.nbytes for a in arrays] == [40, 8, 24, 4, 6, 6]
    assert all(a.dtype == np.uint8 and a.ndim == 1 for a in arrays)
    assert arrays[0].ctypes.data == flat.data_ptr(), "a view, not a copy"
    got = dict(split(arrays, [TensorEntry.of(name, tensor) for name, tensor in tensors.items()]))
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name], tensor), name


def test_a_short_run_is_cut_where_ray_would_start_threads() -> None:
    half = PLAIN_BYTES // 2
    short = torch.zeros(5 * half, dtype=torch.uint8).split(half)
    assert [a.nbytes for a in to_arrays(short)] == [2 * half, 2 * half, half]
    large = torch.zeros(6 * half, dtype=torch.uint8).split(3 * half)
    assert [a.nbytes for a in to_arrays(large)] == [3 * half, 3 * half], "a tensor lies within one array"
    long = torch.zeros(LONG_BYTES, dtype=torch.uint8).split(half)
    assert [a.nbytes for a in to_arrays(long)] == [LONG_BYTES]


def test_tensors_come_out_of_any_cut_into_arrays() -> None:
    """One array a tensor, as another publisher may give them, with empty ones among them."""
    described = entries(3, 0, 5, 0)
    whole = np.arange(8, dtype=np.uint8)
    empty = whole[:0]
    for arrays in ([whole], [whole[:3], whole[3:]], [empty, whole[:3], empty, whole[3:], empty]):
        got = dict(split(arrays, described))
        assert [t.tolist() for t in got.values()] == [[0, 1, 2], [], [3, 4, 5, 6, 7], []]
    assert next(split([], entries(0)))[1].shape == (0,)
    with pytest.raises(ValueError, match="a bucket of 7 bytes for tensors of 8"):
        list(split([whole[:7]], described))


# -- versions ----------------------------------------------------------------------------------------------


def manifest(version: int) -> Manifest:
    return Manifest(version, "full", (), ())


def test_versions_only_count_up_and_the_old_ones_go() -> None:
    store = WeightStore(keep=2)
    assert store.get() is None, "who asks may wait for it"
    for version in (0, 1, 5):
        assert store.publish(manifest(version)) == version
    newest, older = store.get(), store.get(1)
    assert newest is not None
    assert older is not None
    assert (newest.version, older.version) == (5, 1)
    with pytest.raises(StaleWeightsError, match=r"version 0 is not in the store, which has \[1, 5\]"):
        store.get(0)
    for old in (5, 2):
        with pytest.raises(StaleWeightsError, match=f"version {old} was published after version 5"):
            store.publish(manifest(old))
    assert store.get() == newest


def test_the_ranks_indices_join_in_rank_order() -> None:
    first, second, third = (tuple(entries(n)) for n in (1, 2, 3))
    assert collect_index([(first, second), (), (third,)]) == (first, second, third)


class Publisher:
    """Gives its buckets as return values, as a policy rank does, and may be gone afterwards."""

    def publish(self, tensors: list[torch.Tensor]) -> tuple[str, Any]:
        return "done", to_arrays(tensors)


@pytest.mark.cluster
@pytest.mark.usefixtures("running")
def test_weights_outlive_the_worker_that_made_them() -> None:
    tensors = {
        "bf16": torch.randn(300, 1000).to(torch.bfloat16),
        "odd": torch.arange(7, dtype=torch.int8),
        "none": torch.zeros(0, 4),
        "double": torch.tensor(0.1, dtype=torch.float64),
    }
    actor = ray.remote(Publisher).options(num_cpus=0).remote()
    done, bucket = actor.publish.options(num_returns=2).remote(list(tensors.values()))
    assert ray.get(done, timeout=60) == "done"
    ray.kill(actor)

    index = (tuple(TensorEntry.of(name, tensor) for name, tensor in tensors.items()),)
    store = start_store("tests-weights")
    try:
        ray.get(store.publish.remote(Manifest(3, "full", (bucket,), index)), timeout=60)
        found = find_manifest("tests-weights", None, 30)
        assert (found.version, found.nbytes) == (3, 600_000 + 7 + 0 + 8)
        got = dict(read(found, 30))
        assert list(got) == list(tensors)
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), name
    finally:
        ray.kill(store)


class Reader:
    """Pulls a version slowly, in a process of its own."""

    def begin(self, store: str) -> int:
        found = find_manifest(store, None, 30)
        self.rest = read(found, 30)
        next(self.rest)
        return found.version

    def finish(self) -> list[float]:
        return [float(tensor.sum()) for _, tensor in self.rest]


def published(store: Any, version: int) -> None:
    """Three buckets of a version; the caller's references are gone afterwards."""
    actor = ray.remote(Publisher).options(num_cpus=0).remote()
    index, buckets = [], []
    for number in range(3):
        tensors = [torch.full((1000, 1000), float(10 * version + number))]
        done, bucket = actor.publish.options(num_returns=2).remote(tensors)
        ray.get(done, timeout=60)
        index.append((TensorEntry.of(f"w{number}", tensors[0]),))
        buckets.append(bucket)
    ray.get(store.publish.remote(Manifest(version, "full", tuple(buckets), tuple(index))), timeout=60)
    ray.kill(actor)


@pytest.mark.cluster
@pytest.mark.usefixtures("running")
def test_a_pull_ends_with_the_version_that_it_began_with_though_the_store_has_a_newer_one() -> None:
    store = start_store("tests-slow-reader", keep=1)
    reader = ray.remote(Reader).options(num_cpus=0).remote()
    try:
        published(store, 0)
        assert ray.get(reader.begin.remote("tests-slow-reader"), timeout=60) == 0
        for version in (1, 2):
            published(store, version)
        assert find_manifest("tests-slow-reader", None, 30).version == 2
        assert ray.get(reader.finish.remote(), timeout=60) == [1e6, 2e6]
        assert ray.get(reader.begin.remote("tests-slow-reader"), timeout=60) == 2
        assert ray.get(reader.finish.remote(), timeout=60) == [21e6, 22e6]
    finally:
        ray.kill(reader)
        ray.kill(store)


def test_the_next_bucket_is_fetched_while_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [TensorEntry(name, "uint8", (2,)) for name in "abc"]
    events: list[str] = []

    def get(ref: str, timeout: float) -> list[np.ndarray]:
        events.append(f"get {ref}")
        return [np.frombuffer(ref.encode() * 2, dtype=np.uint8)]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: events.append(f"fetch {refs[0]} {timeout}"))
    manifest = Manifest(1, "full", ("x", "y", "z"), tuple((entry,) for entry in named))
    for name, tensor in read(manifest, 5.0):
        events.append(f"{name} {bytes(tensor.numpy()).decode()}")
    assert events == ["get x", "fetch y 0", "a xx", "get y", "fetch z 0", "b yy", "get z", "c zz"]
