"""Settings of what is trained: the whole model, or a small adapter on it."""

from __future__ import annotations

import re
from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Tuner")


class TunerOptions(Options):
    """Full training or LoRA, and LoRA's shape."""

    train_type: Literal["lora", "full"] = _setting(
        "lora", "lora trains a small adapter, full trains every weight."
    )
    lora_rank: int = _setting(8, "Rank of the adapter matrices.", ge=1)
    lora_alpha: float = _setting(32, "LoRA scale: the adapter's output is multiplied by alpha / rank.", gt=0)
    lora_dropout: float = _setting(0.05, "Share of the adapter's inputs dropped while training.", ge=0, lt=1)
    target_modules: tuple[str, ...] = _setting(
        ("all-linear",), "Modules that get an adapter: all-linear (all but the head) or name endings."
    )
    target_regex: str | None = _setting(
        None,
        "Modules that get an adapter, as a regular expression that matches their whole name; it goes "
        "before --target_modules.",
    )
    target_parameters: tuple[str, ...] = _setting(
        (),
        "Parameters that get an adapter though they lie in no linear layer, by the endings of their names: "
        "the experts of a mixture, such as mlp.experts.gate_up_proj mlp.experts.down_proj. Needs "
        "--lora_dropout 0.",
    )
    modules_to_save: tuple[str, ...] = _setting(
        (), "Modules trained whole beside the adapter and saved with it, such as embed_tokens."
    )
    use_rslora: bool = _setting(False, "Rank-stabilised LoRA: scale by alpha / sqrt(rank).")
    use_dora: bool = _setting(False, "DoRA: learn magnitude and direction of the weights apart.")
    quant_method: Literal["bnb"] | None = _setting(
        None, "Quantise the frozen base model (QLoRA): bnb is bitsandbytes. Goes with --quant_bits."
    )
    quant_bits: Literal[4] | None = _setting(
        None, "Bits of a quantised weight: 4 is NF4. Goes with --quant_method."
    )
    freeze_llm: bool = _setting(False, "Vision models: leave the language model as it is.")
    freeze_vit: bool = _setting(True, "Vision models: leave the vision tower as it is.")
    freeze_aligner: bool = _setting(True, "Vision models: leave the projection from vision to text as it is.")

    @model_validator(mode="after")
    def _check_tuner(self) -> Self:
        if (self.quant_method is None) != (self.quant_bits is None):
            raise ConfigError(
                "--quant_method and --quant_bits go together: write --quant_method bnb --quant_bits 4."
            )
        if self.train_type == "full":
            if self.quant_bits is not None:
                raise ConfigError(
                    f"--train_type full cannot train a model quantised with --quant_bits {self.quant_bits}: "
                    "use --train_type lora (QLoRA), or leave out --quant_method and --quant_bits."
                )
            for name in ("use_dora", "use_rslora"):
                if getattr(self, name):
                    raise ConfigError(f"--{name} is a kind of LoRA: it needs --train_type lora, not full.")
        elif not self.target_modules and self.target_regex is None and not self.target_parameters:
            raise ConfigError(
                "--target_modules is empty, so --train_type lora has nothing to train: name modules or use "
                "all-linear."
            )
        if self.freeze_llm and self.freeze_vit and self.freeze_aligner and self.target_regex is None:
            raise ConfigError(
                "--freeze_llm true leaves nothing to train: add --freeze_vit false or --freeze_aligner false."
            )
        if self.target_parameters and self.train_type == "lora":
            self._check_target_parameters()
        if self.target_regex is not None:
            try:
                re.compile(self.target_regex)
            except re.error as error:
                raise ConfigError(f"--target_regex {self.target_regex}: {error}.") from None
        return self

    def _check_target_parameters(self) -> None:
        if self.lora_dropout:
            raise ConfigError(
                f"--target_parameters needs --lora_dropout 0, not {self.lora_dropout:g}: the adapter is "
                "added to the weights, so there are no inputs of its own to drop."
            )
        if self.use_dora:
            raise ConfigError(
                "--use_dora true does not go with --target_parameters: PEFT has no DoRA for them."
            )
        if self.quant_bits is not None:
            raise ConfigError(
                "--quant_bits does not go with --target_parameters: those parameters stay unquantised."
            )
