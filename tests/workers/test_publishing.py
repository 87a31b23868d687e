"""A rank's publications, and the block of host memory that its weights are copied into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError

from raytune_rl.models.weights import whole
from raytune_rl.protocol.weights import DeltaOn, Manifest, TensorEntry
from raytune_rl.runtime.weights import read, to_arrays
from raytune_rl.workers.publishing import HostBuffer, Publisher


def test_a_bucket_is_one_piece_of_memory_that_is_used_again() -> None:
    tensors = {
        "a": torch.randn(7, 5).bfloat16(),
        "b": torch.randn(3).bfloat16(),
        "scale": torch.randn(4),  # another type begins where it may
        "flags": torch.arange(3, dtype=torch.uint8),
        "c": torch.randn(2, 2).bfloat16(),
    }
    buffer = HostBuffer([TensorEntry.of(name, tensor) for name, tensor in tensors.items()], pinned=False)
    taken = {name: buffer.take(name, tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert taken[name].dtype == tensor.dtype
        assert torch.equal(taken[name], tensor)
    assert len(to_arrays([taken["a"], taken["b"]])) == 1
    assert len(to_arrays(taken.values())) == 4, "one a type"
    later = buffer.take("a", tensors["a"] + 1)
    assert later.data_ptr() == taken["a"].data_ptr()
    assert torch.equal(taken["a"], tensors["a"] + 1)


class Weights:
    """An exporter of some tensors."""

    def __init__(self) -> None:
        self.now = {
            "matrix": torch.randn(300, 400).bfloat16(),
            "vector": torch.randn(50).bfloat16(),
            "scale": torch.randn(7),
            "none": torch.empty(0, 3),
        }
        self.index = tuple(TensorEntry.of(name, tensor) for name, tensor in self.now.items())

    def tensors(self, names: set[str], gather: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.now.items()

    def step(self, share: float) -> None:
        for tensor in self.now.values():
            tensor[torch.rand(tensor.shape) < share] *= -1.25
        self.now["vector"][:2] = torch.tensor([-0.0, float("nan")])


def test_differences_are_the_weights_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version after version on one base, each read as by one who comes late; a lost base, and a step that
    changes nearly everything, make a version whole.
    """
    torch.manual_seed(0)
    stored: dict[str, Any] = {}

    def get(ref: str, timeout: float) -> Any:
        if ref not in stored:
            raise ObjectLostError("0" * 56, None, "lost")
        return stored[ref]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: None)
    weights = Weights()
    publisher = Publisher(cast(Any, weights), whole, 0, 1, 1.0)
    index = publisher.index()

    def published(name: str, base: str | None) -> int | None:
        """Publishes a version on a base and reads it; the bytes of the difference."""
        (nbytes,), arrays = publisher.publish([] if base is None else [base])
        stored[name] = [array.copy() for array in arrays]
        delta = () if nbytes is None or base is None else (DeltaOn(base, nbytes),)
        found = dict(read(Manifest(0, "full", (name,), index, None, delta), 1.0))
        assert list(found) == [entry.name for entry in index[0]]
        for each, tensor in weights.now.items():
            assert found[each].dtype == tensor.dtype
            assert found[each].shape == tensor.shape
            flat = tensor.reshape(-1)
            assert torch.equal(found[each].reshape(-1).view(torch.uint8), flat.view(torch.uint8)), each
        return nbytes

    assert published("v0", None) is None
    sizes = []
    for version in range(1, 4):
        weights.step(0.01)
        sizes.append(published(f"v{version}", "v0"))
    assert None not in sizes
    assert sizes == sorted(cast(Any, sizes)), "on one base they grow"
    assert sizes[0] < 0.05 * sum(entry.nbytes for entry in index[0])
    weights.step(0.9)
    assert published("v4", "v0") is None, "a difference would not be smaller"
    del stored["v4"]
    weights.step(0.01)
    assert published("v5", "v4") is None, "what it would stand on is lost"
    weights.step(0.01)
    assert published("v6", "v5") is not None
