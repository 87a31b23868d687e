"""How each teacher is told to start: as a model of Transformers, or as an engine of vLLM."""

from __future__ import annotations

from dataclasses import replace

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.groups import specs
from raytune_rl.groups.sizes import Groups
from raytune_rl.protocol.model import ModelSpec
from raytune_rl.protocol.rollout import EngineSpec


def loaded(config: RLHFConfig, policy: ModelSpec) -> list[ModelSpec]:
    """The model settings of each teacher, in the order of `--teacher_model`."""
    if not config.has_teachers:
        return []
    paths = config.teacher_model or (policy.path,)
    taught = replace(policy, adapters=config.teacher_adapters, quant_bits=config.teacher_quant_bits)
    return [replace(taught, path=path) for path in paths]


def served(config: RLHFConfig, groups: Groups, name: str, model: str, longest: int) -> EngineSpec:
    """The settings of a teacher that vLLM serves, and asks about rows of up to `longest` tokens."""
    on_gpu = groups.on_gpu
    return EngineSpec(
        model=model,
        dtype=specs.dtype(config, on_gpu),
        max_model_len=longest,
        store=None,
        pull_timeout_s=config.step_timeout,
        tensor_parallel_size=gpus_of_one(groups, name),
        kv_cache_bytes=None if on_gpu else specs.CPU_CACHE_BYTES,
        enforce_eager=True,  # it computes prompts, which no CUDA graph is for
        enable_prefix_caching=False,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        use_hf=config.use_hf,
    )


def gpus_of_one(groups: Groups, name: str) -> int:
    """GPUs that one copy of a teacher is spread over, where vLLM serves it."""
    return max(1, int(groups[name].gpus))


def check(config: RLHFConfig, groups: Groups, takes_media: bool) -> None:
    """Refuses teachers that vLLM cannot serve here.

    Raises:
        ConfigError: They share GPUs, or read media.
    """
    if not config.has_teachers or config.teacher_backend != "vllm":
        return
    if groups.colocated:
        raise ConfigError(
            "--teacher_backend vllm wants GPUs of its own, since its engine keeps the memory that it has: "
            "add --colocate false, or leave it out."
        )
    if groups.on_gpu and config.gpus_per_teacher_worker == 0:
        raise ConfigError(
            "--gpus_per_teacher_worker 0: --teacher_backend vllm serves on GPUs, as the policy "
            "trains on some: give 1 or more."
        )
    if takes_media:
        raise ConfigError(
            f"--teacher_backend vllm reads texts only, but the model {config.model} takes media: leave it "
            "out."
        )
