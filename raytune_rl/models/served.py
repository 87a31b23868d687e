"""Which adapters vLLM serves as they are, beside their base model. All others have to be merged into it."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raytune_rl.errors import ModelError
from raytune_rl.models.hub import first_line

ADAPTER_CONFIG = "adapter_config.json"
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""Names that families have for the embedding and the head."""
_PARENTS = ("", "model.", "transformer.", "gpt_neox.", "model.decoder.", "model.language_model.")
SAFETENSORS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be set up for."""
NOT_SERVED = ("embed_tokens", "lm_head", "all-embedding")
"""Targets on which vLLM serves no adapter."""


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """PEFT's settings of an adapter's folder.

    Raises:
        ModelError: There are none that can be read.
    """
    file = Path(directory).expanduser() / ADAPTER_CONFIG
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if (peft_type := settings.get("peft_type", "LORA")) != "LORA":
        raise ModelError(
            f"{file}: its peft_type is {peft_type}, but only LoRA adapters (DoRA and rsLoRA too) are known"
        )
    return settings


def adapter_tensors(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's weights.

    Raises:
        ModelError: There is no file of weights that can be read; one that holds more than tensors is not.
    """
    folder = Path(directory).expanduser()
    file = folder / SAFETENSORS
    try:
        if file.is_file():
            with safe_open(file, framework="np") as stored:
                return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        file = folder / PICKLED
        if file.is_file():
            import torch

            loaded = torch.load(file, map_location="cpu", weights_only=True)
            return {str(name): tuple(tensor.shape) for name, tensor in loaded.items()}
    except (OSError, SafetensorError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} holds more than tensors, so it is not opened: it could run code. Save the adapter again "
            "as safetensors"
        ) from error
    raise ModelError(f"{folder} has no weights: neither {SAFETENSORS} nor {PICKLED} is there")


def held_back(settings: Mapping[str, Any], names: Collection[str] = ()) -> list[str]:
    """The parts of an adapter that vLLM does not serve; empty if none.

    Args:
        settings: By PEFT's names.
        names: Of its weights.
    """
    targets: str | Sequence[str] = settings.get("target_modules") or ()
    named = (targets,) if isinstance(targets, str) else targets
    outside = sorted({part for part in NOT_SERVED for name in named if part in name})
    whole = sorted({name.rsplit(".", 1)[0] for name in names if ".lora_" not in name})
    has = {
        "DoRA": settings.get("use_dora"),
        "modules trained whole (modules_to_save)": settings.get("modules_to_save"),
        "single tokens' embeddings (trainable_token_indices)": settings.get("trainable_token_indices"),
        "parameters as targets (target_parameters)": settings.get("target_parameters"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "ranks that differ by module": settings.get("rank_pattern") or settings.get("alpha_pattern"),
        f"a rank over {LORA_RANKS[-1]}": int(settings.get("r", 0)) > LORA_RANKS[-1],
        f"weights on {' and '.join(outside)}": outside,
    }
    if whole and not any(has.values()):
        shown = [name.removeprefix("base_model.model.") for name in whole[:2]]
        has[f"whole weights of {' and '.join(shown)}"] = True
    return [what for what, is_there in has.items() if is_there]


def unties_head(settings: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether an adapter trains the embedding or the head alone or each by itself: where they are tied, they
    no longer are. What PEFT saves of them without training it (`save_embedding_layers`), and rows of single
    tokens, stay the same for both.

    Args:
        settings: By PEFT's names.
        names: Of its weights.
    """
    if settings.get("ensure_weight_tying"):
        return False
    kept = [f".{name}." for name in settings.get("modules_to_save") or ()]
    trained = [f".{n}" for n in names if ".lora_" in n or any(name in f".{n}" for name in kept)]
    return any(f".{part}." in name for part in EMBEDDINGS for name in trained)


def head_is_targeted(targets: str | Sequence[str], modules_to_save: Sequence[str]) -> bool:
    """The same of an adapter yet to be made.

    Args:
        targets: A regular expression over modules' names, or the ends of names, as `TunerSettings` has them.
        modules_to_save: As there.
    """
    if isinstance(targets, str):
        named = [f"{part}{name}" for name in EMBEDDINGS for part in _PARENTS]
        found = any(re.fullmatch(targets, name) for name in named)
    else:
        found = "all-embedding" in targets or any(t.rsplit(".", 1)[-1] in EMBEDDINGS for t in targets)
    return found or any(name.rsplit(".", 1)[-1] in EMBEDDINGS for name in modules_to_save)
