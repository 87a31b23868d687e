"""The algorithm and its constants."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.config.preference import READS
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")

BUILT = ("grpo",)
"""The values of `rlhf_type` that run."""


class RLOptions(Options):
    """GRPO's constants (Shao et al. 2024, DeepSeekMath; DAPO, Yu et al. 2025; Dr. GRPO, Liu et al. 2025)."""

    rlhf_type: Literal["grpo", "dapo", "ppo", "dpo", "kto", "orpo", "cpo", "simpo", "rm", "gkd"] = _setting(
        "grpo",
        "Algorithm. Of those that sample, grpo runs at this stage; dpo, kto, orpo, cpo, simpo and rm learn "
        "from preferences in the data and have flags of their own: raytune-rl rlhf --rlhf_type dpo --help.",
    )
    beta: float = _setting(
        0.04, "Weight of the KL term that ties the policy to the reference; 0: no reference model.", ge=0
    )
    epsilon: float = _setting(0.2, "Clip the ratio below 1 - epsilon.", gt=0, lt=1)
    epsilon_high: float | None = _setting(
        None, "Clip the ratio above 1 + epsilon_high. Not set: --epsilon.", gt=0
    )
    delta: float | None = _setting(
        None, "Upper cap on the ratio where the advantage is negative. Not set: no cap.", gt=1
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = _setting(
        "grpo",
        "How token losses become one: grpo averages over each completion first, bnpo and dapo over all "
        "tokens "
        "of the step, dr_grpo divides by completions * --max_completion_length.",
    )
    scale_rewards: Literal["group", "batch", "none"] = _setting(
        "group", "Divide advantages by the spread of rewards in the group, in the batch, or not."
    )
    num_iterations: int = _setting(1, "Times that each generation is trained on.", ge=1)
    steps_per_generation: int | None = _setting(
        None, "Accumulation steps per generation. Not set: --gradient_accumulation_steps.", ge=1
    )
    generation_batch_size: int | None = _setting(
        None, "The same as a number of completions; give only one of the two.", ge=1
    )
    log_completions: bool = _setting(False, "Write prompts, completions and rewards to completions.jsonl.")

    @model_validator(mode="after")
    def _check_rl(self) -> Self:
        if self.rlhf_type in READS:
            raise ConfigError(
                f"--rlhf_type {self.rlhf_type} learns from preferences in the data: its settings are a "
                "PreferenceConfig, not an RLHFConfig."
            )
        if self.rlhf_type not in BUILT:
            raise ConfigError(
                f"--rlhf_type {self.rlhf_type} is not built yet; what runs today: {', '.join(BUILT)}."
            )
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise ConfigError(
                f"--steps_per_generation {self.steps_per_generation} and --generation_batch_size "
                f"{self.generation_batch_size} set the same thing: give only one of the two."
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ConfigError(
                f"--delta {self.delta} must be over 1 + --epsilon_high = {1 + high:g}, or it would cut into "
                "the clip "
                "range."
            )
        return self
