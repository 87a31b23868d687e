"""The block of host memory that a rank's weights are copied into."""

from __future__ import annotations

import torch

from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.weights import to_arrays
from raytune_rl.workers.publishing import HostBuffer


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
