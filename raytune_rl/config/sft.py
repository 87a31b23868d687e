"""What only supervised fine-tuning has."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Data")


class SupervisedOptions(Options):
    """Which tokens are learned, and whether rows are packed."""

    loss_scale: Literal["default", "last_round", "all"] = _setting(
        "default",
        "Tokens to learn: default is every assistant turn, last_round those after the last user turn, all "
        "the whole row.",
    )
    packing: bool = _setting(
        False,
        "Fill packs of --max_length tokens with rows (best fit). Batch sizes then count packs; rows of a "
        "pack do not see each other.",
    )

    @model_validator(mode="after")
    def _check_supervised(self) -> Self:
        if self.packing and getattr(self, "padding_free", None) is False:
            raise ConfigError(
                "--packing true lays rows end to end, which --padding_free false forbids: "
                "leave out one of the two."
            )
        return self
