"""Which adapters vLLM serves as they are, beside their base model. All others have to be merged into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_rl.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
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
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def held_back(settings: Mapping[str, Any]) -> list[str]:
    """What an adapter of these settings (PEFT's names) has that vLLM does not serve; empty if nothing."""
    targets: str | Sequence[str] = settings.get("target_modules") or ()
    named = (targets,) if isinstance(targets, str) else targets
    outside = sorted({part for part in NOT_SERVED for name in named if part in name})
    has = {
        "DoRA": settings.get("use_dora"),
        "modules trained whole (modules_to_save)": settings.get("modules_to_save"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "ranks that differ by module": settings.get("rank_pattern") or settings.get("alpha_pattern"),
        f"a rank over {LORA_RANKS[-1]}": int(settings.get("r", 0)) > LORA_RANKS[-1],
        f"weights on {' and '.join(outside)}": outside,
    }
    return [what for what, there in has.items() if there]
