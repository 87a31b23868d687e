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

_AMOUNTS = (
    (re.compile(r"Tried to allocate ([\d.]+ \w+)"), "{} were asked for"),
    (re.compile(r"you tried to allocate (\d+ bytes)"), "{} were asked for"),
    (re.compile(r"total capacity of ([\d.]+ \w+)"), "the GPU has {}"),
    (re.compile(r"of which ([\d.]+ \w+) is free"), "{} were free"),
    (re.compile(r"Memory on the node \(.*?\).*? was ([\d.]+\w+ / [\d.]+\w+)"), "the node had used {}"),
)
_KINDS = (
    (re.compile(r"No available memory for the cache blocks|larger than the available KV cache"), "cache"),
    (re.compile(r"Free memory on device .* is less than desired GPU memory"), "GPU"),
    (re.compile(r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError: CUDA"), "GPU"),
    (re.compile(r"ObjectStoreFullError|object store is full|Failed to put object"), "store"),
    (
        re.compile(r"memory usage threshold|due to the node running low"),
        "host",
    ),
    (re.compile(r"DefaultCPUAllocator: (not enough|can't allocate) memory|\bMemoryError\b"), "host"),
)
_SAID = {
    "cache": ("no GPU memory for its engine's key-value cache", CACHE_FLAGS),
    "GPU": ("ran out of GPU memory", GPU_FLAGS),
    "store": ("found Ray's object store full", STORE_FLAGS),
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
