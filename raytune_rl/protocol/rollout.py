"""How rollout engines are built and how they sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.protocol.media import NO_LIMITS, MediaLimits

GPU_SHARE = 0.9
"""Of a GPU's memory, for an engine that has the GPU to itself."""


@dataclass(frozen=True)
class MultiTurnSpec:
    """Who answers the model, in conversations of several turns.

    Attributes:
        scheduler: Registered name.
        max_turns: Of the model; None is no limit but the length.
        plugin_files: Files that may register it.
        timeout_s: For the scheduler's answers of one round, seconds.
    """

    scheduler: str
    max_turns: int | None
    plugin_files: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True)
class EngineSpec:
    """How to build an engine.

    Attributes:
        model: Local directory of the base model.
        dtype: torch dtype name of the weights.
        max_model_len: Longest prompt plus completion, tokens.
        store: Name of the weight store's actor; None serves what lies in `model` (and `adapter`) as version
            0.
        pull_timeout_s: Deadline for pulling one version, seconds.
        tensor_parallel_size: GPUs of one engine.
        gpu_memory_utilization: Share of each GPU that vLLM may use.
        kv_cache_bytes: Size of the key-value cache; None leaves it to `gpu_memory_utilization` (the way on
            GPUs).
        max_num_seqs: Sequences decoded at once; None is vLLM's default.
        enforce_eager: No CUDA graphs or compilation.
        enable_prefix_caching: Share the prompt's key-value blocks among completions.
        lora_rank: Rank of the adapters it will serve; 0 when weights arrive merged or the training is full.
        trust_remote_code: Run code from the model's directory.
        seed: Engine seed; each completion has a seed of its own besides.
        use_hf: A hub id is one of Hugging Face instead of ModelScope.
        sleep_level: What to drop between generations on a GPU: 0 nothing, 1 weights to the CPU, 2 weights
            discarded.
        prompt_limits: Most items of each kind ("image", ...) in one prompt; None for a model
            that takes texts only.
        media_limits: How much of a medium is shown.
        more: Further arguments of vLLM's EngineArgs.
        adapter: Local directory of a LoRA adapter to serve; only without a store.
        multi_turn: For conversations of several turns; None: one completion a prompt.
    """

    model: str
    dtype: str
    max_model_len: int
    store: str | None
    pull_timeout_s: float
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = GPU_SHARE
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    lora_rank: int = 0
    trust_remote_code: bool = False
    seed: int = 0
    use_hf: bool = False
    sleep_level: int = 0
    prompt_limits: Mapping[str, int] | None = None
    media_limits: MediaLimits = NO_LIMITS
    more: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    multi_turn: MultiTurnSpec | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Names and meaning are vLLM's; `disallowed_token_ids` tokens are never drawn."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    disallowed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class StreamChunk:
    """A part of an answer while it is written; the last has the reason for which it ends."""

    text: str
    finish_reason: str | None = None
