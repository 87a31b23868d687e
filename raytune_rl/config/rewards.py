"""What a completion is worth."""

from __future__ import annotations

from functools import partial
from typing import Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Rewards")


class RewardOptions(Options):
    """Reward functions and their weights."""

    reward_funcs: tuple[str, ...] = _setting(
        (), "Reward functions by name: accuracy, format, or one that a plugin registers."
    )
    reward_weights: tuple[float, ...] = _setting((), "One weight per reward function. Not set: 1 each.")
    external_plugins: tuple[str, ...] = _setting((), "Python files to load first, which register rewards.")
    reward_timeout: float = _setting(
        30.0,
        "Seconds that one reward function may take for one completion; over it the sample is a failure.",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise ConfigError(
                f"--reward_weights has {len(self.reward_weights)} values but --reward_funcs names "
                f"{len(self.reward_funcs)}: give one weight per function."
            )
        return self
