"""Settings of the rewards."""

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
        (),
        "Reward functions by name: accuracy, format, cosine, repetition, soft_overlong, or one that a plugin "
        "registers.",
    )
    reward_weights: tuple[float, ...] = _setting((), "One weight per reward function. Not set: 1 each.")
    external_plugins: tuple[str, ...] = _setting(
        (), "Python files to load first, which register rewards or losses."
    )
    reward_model: tuple[str, ...] = _setting(
        (),
        "Reward models, beside or instead of --reward_funcs: folders or hub ids of sequence classifiers with "
        "one label, adapters of such, or language models (see --reward_model_plugin).",
    )
    reward_model_plugin: tuple[str, ...] = _setting(
        (),
        "How each reward model is asked. default: its score of the whole conversation; genrm: a language "
        "model grades it in words, read from its last 'Reward: x', x from 0 to 1; or a class that a plugin "
        "registers by rm_plugins['name'] = Class.",
    )
    reward_timeout: float = _setting(
        30.0,
        "Seconds that one reward function may take for one completion; over it the sample has no reward, and "
        "all that the function started is ended. A call with a whole batch has as many times that as it has "
        "completions, and ends as soon as one of them is seen to take longer; they are then tried alone.",
        gt=0,
    )
    reward_memory_limit: float = _setting(
        16.0,
        "GiB of address space that a process of reward functions may have; over it the sample is a failure. "
        "A plugin that imports torch takes some 4 to 10 of them, most of it never used. 0: no limit.",
        ge=0,
    )
    cosine_min_len_value_correct: float = _setting(1.0, "cosine: of a right answer of 0 tokens.")
    cosine_max_len_value_correct: float = _setting(0.5, "cosine: of a right answer of --cosine_max_len.")
    cosine_min_len_value_wrong: float = _setting(-0.5, "cosine: of a wrong answer of 0 tokens.")
    cosine_max_len_value_wrong: float = _setting(0.0, "cosine: of a wrong answer of --cosine_max_len.")
    cosine_max_len: int | None = _setting(
        None, "cosine: tokens over which the value changes. Not set: --max_completion_length.", ge=1
    )
    repetition_n_grams: int = _setting(
        3,
        "repetition: words in a row that count as one. In scripts without blanks (Chinese, Japanese, Thai) a "
        "word is a character.",
        ge=1,
    )
    repetition_max_penalty: float = _setting(-1.0, "repetition: of nothing but repetition.", le=0)
    soft_max_length: int | None = _setting(
        None, "soft_overlong: tokens at which the penalty is -1. Not set: --max_completion_length.", ge=2
    )
    soft_cache_length: int | None = _setting(
        None, "soft_overlong: tokens before that limit in which the penalty grows from 0; required.", ge=1
    )

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        rewards = len(self.reward_funcs) + len(self.reward_model)
        if self.reward_weights and len(self.reward_weights) != rewards:
            models = f" and --reward_model {len(self.reward_model)}" if self.reward_model else ""
            raise ConfigError(
                f"--reward_weights has {len(self.reward_weights)} values but --reward_funcs names "
                f"{len(self.reward_funcs)}{models}: give one weight per function"
                f"{', then one per model' if models else ''}."
            )
        if len(self.reward_model_plugin) not in (0, len(self.reward_model)):
            raise ConfigError(
                f"--reward_model_plugin has {len(self.reward_model_plugin)} values for "
                f"{len(self.reward_model)} reward models: give one for each, or none."
            )
        if "soft_overlong" in self.reward_funcs and self.soft_cache_length is None:
            raise ConfigError(
                "--reward_funcs soft_overlong needs --soft_cache_length: the tokens before the length limit "
                "in which the penalty grows."
            )
        return self
