"""Trying reward functions out."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Self

from pydantic import model_validator

from raytune_rl.config.base import setting
from raytune_rl.config.data import IdentityOptions
from raytune_rl.config.rewards import RewardOptions
from raytune_rl.errors import ConfigError

_data = partial(setting, "Data")


class RewardCheckConfig(IdentityOptions, RewardOptions):
    """`raytune-rl reward-check`: run reward functions over a data set's own solutions, without a model."""

    COMMAND: ClassVar[str] = "reward-check"

    dataset: tuple[str, ...] = _data((), "The data, written as for raytune-rl rlhf.")
    columns: dict[str, str] = _data(
        {}, 'Columns to rename, as JSON: \'{"name in the file": "name that is meant"}\'.'
    )
    rows: int = _data(256, "Rows to try, drawn at random; 0: all.", ge=0)
    data_seed: int = _data(42, "Seed of that draw.", ge=0)
    strict: bool = _data(True, "true: stop at a row that cannot be used. false: leave it out, and say so.")
    use_hf: bool = _data(False, "Take ids of data sets from Hugging Face instead of ModelScope.")
    model: str | None = setting(
        "Model",
        None,
        "Model whose tokenizer counts tokens, for cosine and soft_overlong. Not set: a token is taken for "
        "four bytes of text.",
    )
    max_completion_length: int = setting(
        "Sampling", 512, "The same as in training: cosine and soft_overlong depend on it.", ge=1
    )

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        for name in ("dataset", "reward_funcs"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is required.")
        if self.reward_model:
            raise ConfigError("--reward_model: reward-check tries reward functions only: leave it out.")
        return self
