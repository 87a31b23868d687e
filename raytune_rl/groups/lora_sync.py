"""How weights travel from the policy to the engines: whole, or for LoRA the adapter alone."""

from __future__ import annotations

from typing import Any

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.served import LORA_RANKS, held_back, read_adapter_config


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
    if held := held_back(_adapter_settings(config)):
        return f"the adapter has {', '.join(held)}, which vLLM does not serve"
    return None


def engine_rank(config: RLHFConfig) -> int:
    """Rank that the engine makes room for.

    Raises:
        ConfigError: The user's is less than the adapter's, or more than vLLM can.
    """
    own, asked = int(_adapter_settings(config)["r"]), config.vllm_max_lora_rank
    if asked is not None and not own <= asked <= LORA_RANKS[-1]:
        raise ConfigError(
            f"--vllm_max_lora_rank {asked} must be at least the adapter's rank, {own}, and at most "
            f"{LORA_RANKS[-1]}, which is vLLM's limit."
        )
    return asked or own


def _adapter_settings(config: RLHFConfig) -> dict[str, Any]:
    """Of the adapter that will be trained, by PEFT's names: one to go on with keeps its own."""
    if config.adapters:
        return read_adapter_config(resolve_path(config.adapters[-1], use_hf=config.use_hf, what="adapter"))
    return {
        "r": config.lora_rank,
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "target_modules": config.target_regex or config.target_modules,
    }
