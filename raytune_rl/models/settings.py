"""What to train, as plain data: importable where PEFT and Transformers are not wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TunerSettings:
    """What to train; names and defaults are ms-swift's.

    Attributes:
        tuner_type: "full" or "lora".
        lora_rank, lora_alpha, lora_dropout: of LoRA (Hu et al. 2021): W + alpha / rank * B A.
        lora_bias: "none", "all" or "lora_only".
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023).
        use_dora: train magnitude and direction apart (Liu et al. 2024).
        init_weights: PEFT's init_lora_weights ("true", "false", "gaussian", "pissa", ...).
        target_modules: "all-linear" (every nn.Linear but the output head; of a vision model only the parts
            that are not frozen), "all-embedding", or module name suffixes.
        target_regex: full match on module names; replaces target_modules.
        modules_to_save: modules trained in full and stored with the adapter.
        freeze_llm, freeze_vit, freeze_aligner: parts of a vision model that stay as they are.
    """

    tuner_type: Literal["full", "lora"] = "lora"
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_weights: str = "true"
    target_modules: tuple[str, ...] = ("all-linear",)
    target_regex: str | None = None
    modules_to_save: tuple[str, ...] = ()
    freeze_llm: bool = False
    freeze_vit: bool = True
    freeze_aligner: bool = True
