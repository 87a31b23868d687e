"""Loading models, tokenizers and processors from a directory or a hub id.

Choices that were made for the user come back as notices, one line each; whoever loads decides where they are
shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import is_flash_attn_2_available

from raytune_rl.errors import ModelError
from raytune_rl.models.hub import first_line, resolve_path
from raytune_rl.models.scalar import beside_the_head, give_single_label, scalar_class
from raytune_rl.models.sharding import Examined, examine, mend_buffers, zero_init

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# What Transformers and the hubs raise when a directory is not what it should be.
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)


@dataclass(frozen=True)
class Quantization:
    """Load the base weights in low precision with bitsandbytes (QLoRA, Dettmers et al. 2023).

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4"; 4 bits only.
        double_quant: also quantise the scales; 4 bits only.
    """

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be tuned or scored.

    Attributes:
        model: on its device, in eval mode.
        path: the local directory it came from.
        notices: lines for the user about choices made for them.
        new_head: whether the head of a scalar model is random, as the directory has none; an adapter may
            bring one.
    """

    model: PreTrainedModel
    path: str
    notices: tuple[str, ...]
    new_head: bool = False


def load_model(
    path: str,
    *,
    dtype: str | torch.dtype | None = None,
    attn_impl: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
    scalar: bool = False,
    liger: bool = False,
    zero3: Mapping[str, Any] | None = None,
    use_hf: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> LoadedModel:
    """Loads a causal language model or an image-text model.

    Args:
        path: directory or hub id, see `resolve_path`.
        dtype: a name of `DTYPES` or a torch dtype; None takes the model config's on a GPU and float32 on a
            CPU, where the 16-bit types are emulated.
        attn_impl: "flash_attn" (or flash_attention_2), "sdpa", "eager", ...; None lets Transformers choose.
            Flash attention where it cannot run becomes sdpa, with a notice.
        trust_remote_code: run Python code that comes with the model.
        device: where the weights go.
        quantization: load in 4 or 8 bits.
        scalar: load it with a head of one output (reward model, critic) in place of the one over the
            vocabulary. What was saved so keeps its head; another model gets a new one, from torch's random
            state.
        liger: put liger-kernel's layers in place of the model's own; nothing changes on a CPU. Its losses are
            not used: ours sees the hidden states.
        zero3: load it cut into shares, one a rank of the world that torch.distributed has joined: the section
            zero_optimization of a DeepSpeed configuration of stage 3. What cannot be loaded so is loaded
            whole, with a notice.
        use_hf, revision, token: see `resolve_path`.

    Raises:
        ModelError: it is missing, is not a language model, lacks weights, or does not fit the request.
    """
    local = resolve_path(path, use_hf=use_hf, revision=revision, token=token)
    config = load_config(local, trust_remote_code=trust_remote_code)
    where = torch.device(device)
    notices: list[str] = []
    if scalar:
        give_single_label(config, local, lambda: load_tokenizer(local, trust_remote_code=trust_remote_code))
    chosen = _choose_dtype(config, dtype, where, notices)
    options: dict[str, Any] = {"dtype": chosen, "trust_remote_code": trust_remote_code, "config": config}
    attention = _choose_attention(attn_impl, where, chosen, notices, config)
    if attention is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization, chosen)
    kind = scalar_class(config) if scalar else auto_class(config)
    examined: Examined | None = None
    try:
        if zero3 is not None and quantization is None:
            examined = examine(kind, config, local, zero3, options)
            if examined.why_whole:
                notices.append(
                    f"every rank loads the whole model before ZeRO-3 cuts it up: {examined.why_whole}"
                )
                examined = None
            else:  # before any rank waits for another
                new_head = _check_weights(examined.info, local, scalar, notices)
        if quantization is not None or (examined is None and where.type != "cpu"):
            # Tensor by tensor from the file to the device: eight ranks of a machine would fill its memory.
            options["device_map"] = {"": str(where)}
        with zero_init(zero3, chosen) if zero3 is not None and examined else nullcontext():
            model, info = kind.from_pretrained(local, output_loading_info=True, **options)
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot load the model in '{local}': {first_line(error)}") from error
    if examined is not None:
        mend_buffers(model, examined.buffers)
    else:
        new_head = _check_weights(info, local, scalar, notices)
    if quantization is None:
        model = model.to(where)
    elif quantization.bits == 4 and where.type == "cpu":
        _prepare_4bit_on_cpu(model)
    if liger and where.type != "cpu":
        _apply_liger(model)
    _mend_generation_config(model, notices)
    # PEFT writes it into an adapter as the base: found from any directory, and by others if it is a hub's.
    model.name_or_path = str(Path(local).absolute()) if Path(path).expanduser().is_dir() else path
    return LoadedModel(model.eval(), local, tuple(notices), new_head)


def _check_weights(info: Mapping[str, Any], path: str, scalar: bool, notices: list[str]) -> bool:
    """Whether a scalar model's head is new, from Transformers' loading info.

    Raises:
        ModelError: other weights are missing.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    new_head = scalar and "score.weight" in missing
    if scalar:
        missing, unexpected = beside_the_head(missing, unexpected)
    if missing:
        raise ModelError(
            f"'{path}' lacks {len(missing)} weights of the model (first: {missing[0]}); "
            "Transformers would fill them with random numbers. Is it a whole checkpoint of a language model?"
        )
    if unexpected:
        notices.append(
            f"{len(unexpected)} weights in '{path}' are not used by the model (first: {unexpected[0]})"
        )
    return new_head


def _apply_liger(model: Any) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    try:
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    except ImportError as error:
        raise ModelError(
            "--use_liger_kernel true needs the package liger-kernel: set up with EXTRA=gpu, or leave the "
            "flag out"
        ) from error


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's config from a local directory.

    Raises:
        ModelError: there is none; an adapter directory is told apart.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"'{path}' is an adapter, not a model: pass its base as --model and it as --adapters"
            )
        raise ModelError(f"'{path}' is not a model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot read '{path}/config.json': {first_line(error)}") from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a local directory, unchanged.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot load the tokenizer in '{path}': {first_line(error)}") from error


def load_processor(path: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The multimodal processor in a local directory (it holds the tokenizer as `.tokenizer`).

    Args:
        path: local directory.
        trust_remote_code: run Python code that comes with the model.
        **options: overrides of the processor's own settings, such as max_pixels.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot load the processor in '{path}': {first_line(error)}") from error


def load_media_processor(path: str, *, trust_remote_code: bool = False) -> Any | None:
    """The processor of a model that takes media, or None if the directory has only a tokenizer: then it takes
    texts.

    Raises:
        ModelError: It cannot be read.
    """
    processor = load_processor(path, trust_remote_code=trust_remote_code)
    parts = ("image_processor", "video_processor", "audio_processor", "feature_extractor")
    return processor if any(getattr(processor, part, None) is not None for part in parts) else None


def takes_media(config: Any) -> bool:
    """Whether the model takes images, videos or audio."""
    return any(getattr(config, f"{part}_config", None) is not None for part in ("vision", "audio"))


def enable_gradient_checkpointing(model: Any) -> None:
    """Recomputes each layer in the backward; works with frozen base weights too (non-reentrant)."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _mend_generation_config(model: Any, notices: list[str]) -> None:
    """Some hub models carry sampling settings with do_sample off; Transformers loads that and then refuses to
    save it."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        notices.append(
            "the model's generation_config has sampling settings but do_sample off; it is set, to be savable"
        )


def auto_class(config: Any) -> Any:
    """Transformers' class of models for a config.

    Raises:
        ModelError: it is no language model.
    """
    kind = config.model_type
    remote = getattr(config, "auto_map", None) or {}
    if takes_media(config) and (
        kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        or not remote.keys().isdisjoint(("AutoModelForImageTextToText", "AutoModelForMultimodalLM"))
    ):
        return AutoModelForMultimodalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    raise ModelError(
        f"model type '{kind}' is neither a causal nor an image-text language model that Transformers knows"
    )


def _choose_dtype(
    config: Any, wanted: str | torch.dtype | None, device: torch.device, notices: list[str]
) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted is not None:
        if wanted not in DTYPES:
            raise ModelError(f"torch_dtype '{wanted}' is not known; choose float32, float16 or bfloat16")
        return DTYPES[wanted]
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    own = DTYPES.get(own, torch.float32) if isinstance(own, str) else own
    if device.type == "cpu" and own != torch.float32:
        notices.append(
            f"loading in float32 on a CPU (the model's config says {str(own).removeprefix('torch.')}, which "
            "is slow there); set --torch_dtype to choose"
        )
        return torch.float32
    return own


def _choose_attention(
    wanted: str | None, device: torch.device, dtype: torch.dtype, notices: list[str], config: Any
) -> str | None:
    """The kernel to load with, None for Transformers' choice.

    Raises:
        ModelError: The user's leaves out a part of the model's attention.
    """
    if wanted is not None and wanted.startswith("flash"):
        second = wanted in ("flash_attn", "flash_attention", "flash_attention_2")
        problem = None
        if device.type == "cpu":
            problem = "there is no GPU"
        elif second and not is_flash_attn_2_available():
            problem = "flash-attn is not installed"
        elif dtype not in (torch.float16, torch.bfloat16):
            problem = "it needs float16 or bfloat16"
        if problem is None:
            return "flash_attention_2" if second else wanted
        other = "eager" if caps_attention(config) else "sdpa"
        notices.append(f"attn_impl {wanted} cannot run here ({problem}); using {other}")
        return other
    if wanted in (None, "sdpa") and caps_attention(config):
        why = "this model caps its attention's logits (attn_logit_softcapping), and sdpa does not"
        if wanted is not None:
            raise ModelError(f"attn_impl sdpa: {why}, so it would be another model; use eager or flash_attn")
        notices.append(f"{why}: attn_impl eager is used")
        return "eager"
    return wanted


def caps_attention(config: Any) -> bool:
    """Whether attention's logits go through a soft cap (Gemma 2)."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _prepare_4bit_on_cpu(model: Any) -> None:
    """Keeps bitsandbytes 0.50's CPU kernels to what is right.

    The kernel unpacks a row wrongly if 64-value blocks straddle rows; the GPU's does not. And where the CPU
    has AVX512-BF16, the first pass without gradient repacks the weights for a kernel that has no backward.
    """
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        if module.in_features % 64:
            raise ModelError(
                f"4-bit loading on a CPU needs layer widths that are multiples of 64; '{name}' has "
                f"{module.in_features} inputs and would get wrong weights. Use a GPU, or load it unquantised"
            )
        module.support_avx512bf16_for_cpu = False


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization.bits != 4:
        raise ModelError(f"quant_bits is {quantization.bits}; bitsandbytes loads in 4 or 8 bits")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
    )
