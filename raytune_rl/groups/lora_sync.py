"""How weights travel from the policy to the engines: whole, or for LoRA the adapter alone."""

from __future__ import annotations

from typing import Any

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.served import (
    LORA_RANKS,
    adapter_tensors,
    head_is_targeted,
    held_back,
    read_adapter_config,
    unties_head,
)


def publish_mode(config: RLHFConfig, takes_media: bool = False) -> str:
    """Names it: full, merged, or adapter, alone, wherever an engine gives the policy's answers with it.

    Raises:
        ConfigError: `--vllm_enable_lora true` where it would not.
        ModelError: An adapter of `--adapters` cannot be read.
    """
    if config.train_type == "full":
        return "full"
    if config.vllm_enable_lora is False:
        return "merged"
    reason = why_merged(config, takes_media)
    if config.vllm_enable_lora and reason is not None:
        raise ConfigError(f"--vllm_enable_lora true: {reason}; leave it out, and the merged weights travel.")
    return "adapter" if reason is None else "merged"


def why_merged(config: RLHFConfig, takes_media: bool = False) -> str | None:
    """Why an engine that has the base and gets the adapter would not be the policy; None if it would."""
    if takes_media and not (config.freeze_vit and config.freeze_aligner):
        return (
            "vLLM applies adapters to the language model only, but --freeze_vit or --freeze_aligner false "
            "trains others"
        )
    # Modules that the user or an earlier run named may lie in the tower too; all-linear keeps out of it.
    named = "target_regex" if config.target_regex is not None else "target_modules"
    if takes_media and (
        config.adapters or named == "target_regex" or config.target_modules != ("all-linear",)
    ):
        given = "adapters" if config.adapters else named
        return f"vLLM applies adapters to the language model only, but those of --{given} may lie elsewhere"
    if config.quant_bits and "quantization" not in config.vllm_engine_kwargs:
        return (
            "the engine's base model would not be quantised as the policy's is "
            f"(--quant_bits {config.quant_bits})"
        )
    if len(config.adapters) > 1:
        return (
            "of several --adapters the first are merged into the base model, which the engine does not have"
        )
    names = adapter_tensors(_path(config, config.adapters[-1])) if config.adapters else ()
    if withheld := held_back(_adapter_settings(config), names):
        return f"the adapter has {', '.join(withheld)}, which vLLM does not serve"
    return None


def unties(config: RLHFConfig, takes_media: bool = False) -> bool:
    """Whether adapters, or the flags of a new one, give a model that ties head and embedding two matrices, so
    that its engine must be built with two. For models that take media no engine is: the policy refuses those.

    Raises:
        ModelError: An adapter, or the model's config, cannot be read.
    """
    folders = [_path(config, adapter) for adapter in config.adapters]
    from_adapters = any(unties_head(read_adapter_config(f), adapter_tensors(f)) for f in folders)
    if config.train_type == "lora" and not folders:
        from_adapters = head_is_targeted(config.target_regex or config.target_modules, config.modules_to_save)
    if takes_media or not from_adapters:
        return False
    from raytune_rl.models.load import load_config

    assert config.model is not None
    model = resolve_path(config.model, use_hf=config.use_hf)
    text = load_config(model, trust_remote_code=config.trust_remote_code).get_text_config()
    return bool(getattr(text, "tie_word_embeddings", False))


def engine_rank(config: RLHFConfig) -> int:
    """Rank that the engine makes room for.

    Raises:
        ConfigError: The user's is less than the adapter's, or more than vLLM can.
    """
    own, max_rank = int(_adapter_settings(config)["r"]), config.vllm_max_lora_rank
    if max_rank is not None and not own <= max_rank <= LORA_RANKS[-1]:
        raise ConfigError(
            f"--vllm_max_lora_rank {max_rank} must be at least the adapter's rank, {own}, and at most "
            f"{LORA_RANKS[-1]}, which is vLLM's limit."
        )
    return max_rank or own


def _path(config: RLHFConfig, adapter: str) -> str:
    return resolve_path(adapter, use_hf=config.use_hf, what="adapter")


def _adapter_settings(config: RLHFConfig) -> dict[str, Any]:
    """Of the adapter that will be trained, by PEFT's names: one to go on with keeps its own."""
    if config.adapters:
        return read_adapter_config(_path(config, config.adapters[-1]))
    return {
        "r": config.lora_rank,
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "target_modules": config.target_regex or config.target_modules,
        "target_parameters": config.target_parameters,
    }
