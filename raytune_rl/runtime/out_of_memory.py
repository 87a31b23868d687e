"""Memory that ran out, in one sentence: whose, during what, how much was asked for, and what helps."""

from __future__ import annotations

import re

GPU_FLAGS = (
    "lower --max_tokens_per_micro_batch, --gradient_checkpointing true, --sleep_level 1 or 2, "
    "--offload_model true and --offload_optimizer true, lower --vllm_gpu_memory_utilization, "
    "--deepspeed zero3 or zero2_offload, --train_type lora, --quant_method bnb --quant_bits 4"
)
CACHE_FLAGS = (
    "lower --vllm_max_model_len, higher --vllm_gpu_memory_utilization, --offload_model true, "
    "--vllm_tensor_parallel_size 2 with --colocate false"
)
HOST_FLAGS = (
    "fewer workers on a node (--policy_workers_per_node, --rollout_workers_per_node, --reward_workers), "
    "--sleep_level 2 rather than 1, --offload_optimizer false, --dataloader_num_workers 1, nodes with more "
    "memory"
)
STORE_FLAGS = (
    "a larger object store (`ray start --object-store-memory`, /dev/shm of a container), --train_type lora "
    "so that only an adapter is published, fewer --per_device_train_batch_size or --steps_per_generation"
)
DISK_FLAGS = (
    "room on the disk of Ray's session (/tmp/ray, or RAY_TMPDIR), to which the store spills up to 95% of "
    f"it, {STORE_FLAGS}"
)

_AMOUNTS = (
    (re.compile(r"Tried to allocate ([\d.]+ \w+)"), "{} were asked for"),
    (re.compile(r"you tried to allocate (\d+ bytes)"), "{} were asked for"),
    (re.compile(r"total capacity of ([\d.]+ \w+)"), "the GPU has {}"),
    (re.compile(r"of which ([\d.]+ \w+) is free"), "{} were free"),
    (re.compile(r"\(([\d.]+/[\d.]+ GiB)\) on startup"), "{} were free"),
    (re.compile(r"desired GPU memory utilization \([\d.]+, ([\d.]+ GiB)\)"), "{} were asked for"),
    (re.compile(r"\(?([\d.]+ GiB) KV cache is needed"), "{} are needed"),
    (re.compile(r"available KV cache memory \(([\d.]+ GiB)\)"), "{} were there"),
    (re.compile(r"Unable to allocate ([\d.]+ \w+) for an array"), "{} were asked for"),
    (re.compile(r"malloc of size (\d+) failed"), "{} bytes were asked for"),
    (re.compile(r"Memory on the node \(.*?\).*? was ([\d.]+\w+ / [\d.]+\w+)"), "the node had used {}"),
)
_KINDS = (
    (re.compile(r"No available memory for the cache blocks|larger than the available KV cache"), "cache"),
    (re.compile(r"Free memory on device .* is less than desired GPU memory"), "GPU"),
    (re.compile(r"(?i)CUDA (error:|failure[^\n]*?)? ?'?out of memory|OutOfMemoryError: CUDA"), "GPU"),
    (re.compile(r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|NVML_ERROR_MEMORY"), "GPU"),
    (re.compile(r"OutOfDiskError|Local disk is full|local disk's utilization is over capacity"), "disk"),
    (re.compile(r"ObjectStoreFullError|object store is full|Failed to put object"), "store"),
    (
        re.compile(r"memory usage threshold|due to the node running low"),
        "host",
    ),
    (re.compile(r"DefaultCPUAllocator: (not enough|can't allocate) memory|std::bad_alloc"), "host"),
    (re.compile(r"MemoryError\b"), "host"),
    (re.compile(r"\[Errno 12\]|Cannot allocate memory|insufficient shared memory"), "host"),
)
_SAID = {
    "cache": ("no GPU memory for its engine's key-value cache", CACHE_FLAGS),
    "GPU": ("ran out of GPU memory", GPU_FLAGS),
    "store": ("found Ray's object store full", STORE_FLAGS),
    "disk": ("found Ray's object store full, and the disk that it spills to,", DISK_FLAGS),
    "host": ("ran out of the machine's memory", HOST_FLAGS),
}


def explained(who: str, what: str, text: str) -> str | None:
    """The sentence for an error's text; None where it is about something else.

    Args:
        who: The worker, as a person would name it.
        what: The work that it was at.
        text: What the library said.
    """
    kind = next((kind for pattern, kind in _KINDS if pattern.search(text)), None)
    if kind is None:
        return None
    happened, flags = _SAID[kind]
    verb = "has " if kind == "cache" else ""
    found = [words.format(match[1]) for pattern, words in _AMOUNTS if (match := pattern.search(text))]
    amounts = f" ({', '.join(found)})" if found else ""
    return f"{who} {verb}{happened} during '{what}'{amounts}. Try, in this order: {flags}."


def killed(who: str, what: str, kills: int) -> str | None:
    """The sentence for a process that ended while the kernel killed some for their memory; None where it
    killed none.

    Args:
        who, what: As in `explained`.
        kills: Processes that it killed on this machine since the run began.
    """
    if not kills:
        return None
    processes = "a process" if kills == 1 else f"{kills} processes"
    return (
        f"{who} died during '{what}', and since the run began the kernel has killed {processes} here because "
        "the memory of the machine, or of its container, was used up: most likely that is why. Try, in this "
        f"order: {HOST_FLAGS}."
    )
