"""A rollout worker's settings as the arguments of vLLM's engine."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from raytune_rl.errors import ConfigError
from raytune_rl.models.engine_config import fields_for_vllm
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.load import load_config
from raytune_rl.models.served import LORA_RANKS
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.workers import vllm_plugin

PREFILL_TOKENS = 4096
"""Prompt tokens of one engine step on a CPU; a longer prompt has a step of its own."""


def engine_args(spec: EngineSpec) -> dict[str, Any]:
    """Translates a spec into vLLM's arguments; only what was decided is passed, the rest is vLLM's
    default.

    Raises:
        ConfigError: vLLM has no such argument.
    """
    more = dict(spec.more)
    args: dict[str, Any] = {
        "model": resolve_path(spec.model, use_hf=spec.use_hf),
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "enforce_eager": spec.enforce_eager,
        "enable_prefix_caching": spec.enable_prefix_caching,
        "trust_remote_code": spec.trust_remote_code,
        "seed": spec.seed,
        "disable_log_stats": True,
        # Log-probs of the distribution that was really sampled from, so that they compare with the policy's.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=vllm_plugin.BACKEND),
        "enable_sleep_mode": spec.sleep_level > 0 and not current_platform.is_cpu(),
    }
    model = load_config(args["model"], trust_remote_code=spec.trust_remote_code)
    if overrides := fields_for_vllm(model) | more.pop("hf_overrides", {}):
        args["hf_overrides"] = overrides
    if spec.kv_cache_bytes is not None:
        args["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    if not current_platform.is_cpu():
        # It tries kernels of mixtures of experts and of 8-bit layers for minutes, and fetches some.
        args["enable_flashinfer_autotune"] = False
    else:
        # A prompt cut over two steps makes vLLM turn back the request's random generator, which only GPUs can
        # do.
        args |= {
            "enable_chunked_prefill": False,
            # On a GPU vLLM prepares a step while the one before computes; here both want the same cores.
            "async_scheduling": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, spec.max_model_len),
        }
    if spec.max_num_seqs is not None:
        args["max_num_seqs"] = spec.max_num_seqs
    if spec.lora_rank:
        args |= {"enable_lora": True, "max_lora_rank": _vllm_rank(spec.lora_rank), "max_loras": 1}
    if spec.tensor_parallel_size > 1:
        args["distributed_executor_backend"] = "mp"
    if unknown := sorted(more.keys() - {field.name for field in fields(EngineArgs)}):
        raise ConfigError(f"--vllm_engine_kwargs: vLLM's EngineArgs have no {', '.join(unknown)}")
    return args | more


def usage_context() -> UsageContext:
    """What vLLM takes the engine for, by which it chooses how much it computes at a time: on a GPU a program
    that samples offline (1,024 completions and 16,384 prompt tokens on an H100), where its default is 128 and
    2,048 (vLLM 0.32, `engine/arg_utils.py`, `get_batch_defaults`).
    """
    return UsageContext.ENGINE_CONTEXT if current_platform.is_cpu() else UsageContext.LLM_CLASS


def _vllm_rank(rank: int) -> int:
    """vLLM takes a few maximal ranks only: the smallest that holds `rank`."""
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)
