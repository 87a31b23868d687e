"""Settings of supervised fine-tuning alone."""

from __future__ import annotations

import re
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
    enable_dft_loss: bool = _setting(
        False,
        "Weigh each token by its own probability (DFT), so that what the model finds impossible is not "
        "forced on it. Held-out rows are measured by their likelihood all the same.",
    )
    enable_channel_loss: bool = _setting(
        False,
        "Log the loss of each channel apart, as loss_NAME; the rows' column 'channel' names them, at most "
        "100.",
    )
    packing: bool = _setting(
        False,
        "Fill packs of --max_length tokens with rows (best fit). Batch sizes then count packs; rows of a "
        "pack do not see each other.",
    )

    streaming: bool = _setting(
        False,
        "Read and tokenize rows while training, --shuffle_buffer_size at a time, for data that memory cannot "
        "hold. Needs --max_steps; after the last row it begins anew.",
    )
    shuffle_buffer_size: int = _setting(
        1000,
        "Rows of a window under --streaming: they are shuffled, and with --packing packed, among themselves. "
        "The last step of a window may hold fewer.",
        ge=1,
    )

    @model_validator(mode="after")
    def _check_supervised(self) -> Self:
        if self.packing and getattr(self, "padding_free", None) is False:
            raise ConfigError(
                "--packing true lays rows end to end, which --padding_free false forbids: "
                "leave out one of the two."
            )
        if self.streaming:
            self._check_streaming()
        return self

    def _check_streaming(self) -> None:
        if getattr(self, "max_steps", 1) < 1:
            raise ConfigError("--streaming true needs --max_steps: how many rows a stream has is not known.")
        for name in ("save", "eval"):
            if getattr(self, f"{name}_strategy", None) == "epoch":
                raise ConfigError(
                    f"--{name}_strategy epoch needs to know where an epoch ends, which --streaming true does "
                    f"not: give --{name}_steps instead."
                )
        if getattr(self, "split_dataset_ratio", 0) > 0:
            raise ConfigError(
                "--split_dataset_ratio cannot set aside a share of a stream: name the rows with "
                "--val_dataset."
            )
        drawn = [name for name in getattr(self, "dataset", ()) if re.search(r"#\d+$", name)]
        if drawn:
            raise ConfigError(
                f"--dataset {drawn[0]}: rows cannot be drawn from a stream; leave out what follows the #."
            )
