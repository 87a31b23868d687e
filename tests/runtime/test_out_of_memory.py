"""Memory that ran out has a name, an amount, and flags in the order in which to try them."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_rl import cli
from raytune_rl.runtime import kernel_kills
from raytune_rl.runtime.out_of_memory import explained, killed

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
        (
            "ValueError: Free memory on device cuda:0 (30.1/79.11 GiB) on startup is less than desired GPU "
            "memory utilization (0.5, 39.56 GiB). Decrease GPU memory utilization or",
            "rollout[0] ran out of GPU memory during 'starting' (30.1/79.11 GiB were free, 39.56 GiB "
            "were asked for)",
        ),
        (
            "ValueError: To serve at least one request with the models's max seq len (8192), (0.44 GiB KV "
            "cache is needed, which is larger than the available KV cache memory (0.21 GiB).",
            "rollout[0] has no GPU memory for its engine's key-value cache during 'starting' (0.44 GiB are "
            "needed, 0.21 GiB were there)",
        ),
        *(
            (text, "rollout[0] ran out of GPU memory during 'starting'")
            for text in (
                "RuntimeError: CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:139",
                "ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'",
                "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            )
        ),
        *(
            (text, "rollout[0] ran out of the machine's memory during 'starting'")
            for text in (
                "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 3.00 TiB for an array",
                "pyarrow.lib.ArrowMemoryError: malloc of size 1099511627776 failed",
                "OSError: [Errno 12] Cannot allocate memory",
                "RuntimeError: std::bad_alloc",
                "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient "
                "shared memory (shm).",
            )
        ),
        (
            "ray.exceptions.OutOfDiskError: Local disk is full\nThe object cannot be created because the "
            "local object store is full and the local disk's utilization is over capacity (95% by default).",
            "rollout[0] found Ray's object store full, and the disk that it spills to, during 'starting'. "
            "Try, in this order: room on the disk of Ray's session",
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


def test_what_the_kernel_killed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_kills.count(tmp_path) is None
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert kernel_kills.count(tmp_path) == 1
    old = tmp_path / "v1" / "memory"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert kernel_kills.count(tmp_path / "v1") == 3
    counts = iter([1, 3])
    monkeypatch.setattr(kernel_kills, "count", lambda: next(counts))
    monkeypatch.setattr(kernel_kills, "at_start", lambda: 1)
    assert kernel_kills.since_start() == 0
    assert kernel_kills.since_start() == 2
    assert killed("policy[1]", "training step 2", 0) is None
    said = killed("policy[1]", "training step 2", 2)
    assert said is not None
    assert said.startswith("policy[1] died during 'training step 2', and since the run began the kernel has")
    assert "killed 2 processes here" in said
    assert "--policy_workers_per_node" in said


def test_a_driver_without_memory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def asks_too_much() -> int:
        raise MemoryError

    assert cli.guarded(asks_too_much) == 1
    assert "the driver ran out of the machine's memory" in capsys.readouterr().err
