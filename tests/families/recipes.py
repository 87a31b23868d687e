"""Tiny models of the families that Transformers and vLLM both have, made from their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from raytune_rl.tiny.model import drawn, write_once
from raytune_rl.tiny.tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, make_tiny_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
WIDE = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EVERY = {"num_experts_per_tok": 4}
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 64}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,  # and 64: what vLLM has kernels of latent attention for, and published models have
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
DELTA = {
    **WIDE,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", WIDE),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", WIDE),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {**WIDE, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3Text", {**WIDE, "query_pre_attn_scalar": 32}),
    "granite": ("Granite", {"logits_scaling": 8.0, "attention_multiplier": 0.1}),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", WIDE),
    "gpt2": ("GPT2", {**dict.fromkeys(COMMON), **GPT2, "vocab_size": VOCAB_SIZE, "initializer_range": 0.1}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),  # it has none; vLLM would believe it
    "opt": ("OPT", {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.1}),
    "falcon": ("Falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "stablelm": ("StableLm", {}),
    "cohere2": ("Cohere2", {}),
    "smollm3": ("SmolLM3", {}),
    "exaone4": ("Exaone4", {}),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**WIDE, **SMALL_EXPERTS}),
    # 48 is no multiple of the CPU kernel's 32: its packed experts are padded.
    "qwen2_moe": (
        "Qwen2Moe",
        {**EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
    ),
    "mixtral": ("Mixtral", LOCAL_EXPERTS),
    "olmoe": ("Olmoe", EXPERTS),
    "granitemoe": ("GraniteMoe", LOCAL_EXPERTS),
    "glm4_moe": ("Glm4Moe", {**WIDE, **ROUTED}),
    "gpt_oss": ("GptOss", {**WIDE, **LOCAL_EXPERTS}),
    "deepseek_v3": ("DeepseekV3", {**ROUTED, **LATENT}),
    "minimax_m2": (
        "MiniMaxM2",
        {**WIDE, **LOCAL_EXPERTS, "rotary_dim": 16},
    ),
    # In bfloat16, so with all experts for every token: rounding must not choose others.
    "qwen3_next": ("Qwen3Next", {**SMALL_EXPERTS, **DELTA, **EVERY, "shared_expert_intermediate_size": 64}),
    "qwen3_5_text": ("Qwen3_5Text", DELTA),
}
"""By name: the stem of Transformers' classes, and what its configuration has beside `COMMON`."""

ALWAYS_TIED = ("gpt2", "opt", "gemma2", "gemma3", "cohere2", "falcon", "lfm2")
"""Made tied only: their checkpoints are, and of LFM2 vLLM knows no others."""


def make_family(family: str, directory: Path, *, tied: bool) -> Path:
    """Writes a model of a family with its tokenizer: float32, random weights, norms and biases."""
    recipe: dict[str, object] = {"family": family, "tied": tied}
    return write_once(directory, recipe, lambda aside: _write(family, tied, aside))


def _write(family: str, tied: bool, directory: Path) -> None:
    stem, more = FAMILIES[family]
    tokenizer = make_tiny_tokenizer()
    eos, pad = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    given = {k: v for k, v in {**COMMON, **more}.items() if v is not None}
    ends = {"eos_token_id": eos, "pad_token_id": pad, "bos_token_id": None, "tie_word_embeddings": tied}
    config = getattr(transformers, f"{stem}Config")(**given, **ends)
    kind = (
        stem.removesuffix("Text")
        if hasattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")
        else stem
    )
    whole = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel")
    model = drawn(whole, config, seed=0, eos=eos, pad=pad)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
