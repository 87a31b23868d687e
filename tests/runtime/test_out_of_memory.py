"""Memory that ran out has a name, an amount, and flags in the order in which to try them."""

from __future__ import annotations

import pytest

from raytune_rl.runtime.out_of_memory import explained

CUDA = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of "
    "79.11 GiB of which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.90 GiB in use."
)
"""As torch 2.13 says it."""


def test_a_gpu() -> None:
    said = explained("policy[3]", "training step 7", CUDA)
    assert said is not None
    assert said.startswith(
        "policy[3] ran out of GPU memory during 'training step 7' (2.32 GiB were asked for, the GPU has "
        "79.11 GiB, 1.20 GiB were free). Try, in this order: lower --max_tokens_per_micro_batch, "
    )


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            "rollout[0] has no GPU memory for its engine's key-value cache during 'starting'. Try",
        ),
        (
            "ObjectStoreFullError: Failed to put object 00ff in object store because it is full.",
            "rollout[0] found Ray's object store full during 'starting'. Try",
        ),
        (
            "OutOfMemoryError: Task was killed due to the node running low on memory.\nMemory on the node (IP"
            ": 10.0.0.1, ID: a) where the task was running was 31.00GB / 32.00GB (0.96), which exceeds the "
            "memory usage threshold of 0.95.",
            "rollout[0] ran out of the machine's memory during 'starting'",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)",
            "rollout[0] ran out of the machine's memory during 'starting' (4096 bytes were asked for)",
        ),
    ],
)
def test_the_rest(text: str, starts: str) -> None:
    said = explained("rollout[0]", "starting", text)
    assert said is not None
    assert said.startswith(starts)


def test_other_errors_keep_their_words() -> None:
    assert explained("policy[0]", "training step 1", "ValueError: shapes do not match") is None


def test_a_real_allocation_that_no_machine_can_make() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    said = explained("policy[0]", "training step 1", str(raised.value))
    assert said is not None
    assert f"({2**60} bytes were asked for)" in said
