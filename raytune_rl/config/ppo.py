"""PPO: its flags, and what of GRPO's they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")
_cluster = partial(setting, "Cluster")

TWINS: Mapping[str, str] = {"beta": "kl_coef", "epsilon": "cliprange", "num_iterations": "num_ppo_epochs"}
"""GRPO's name -> PPO's name of the same thing. A PPO config has both, equal."""

NOT_PPO = ("loss_type", "loss_args", "importance_sampling_level", "kl_in_reward", "kl_estimator",
           "advantage_estimator", "advantage_args", "scale_rewards", "dynamic_sample")  # fmt: skip
"""Flags of GRPO that PPO decides by itself."""


class PPOOptions(Options):
    """PPO's constants and the critic, with the names and defaults of ms-swift and TRL."""

    rlhf_type: Literal["ppo"] = _setting("ppo", "Algorithm: PPO, with a critic.")
    num_ppo_epochs: int = _setting(4, "Times that each generation is trained on.", ge=1)
    num_mini_batches: int = _setting(
        1, "Optimizer steps that one pass over a generation makes; a generation grows with it.", ge=1
    )
    kl_coef: float = _setting(
        0.05, "Price of a nat of KL to the reference, taken off each token's reward; 0: no reference.", ge=0
    )
    cliprange: float = _setting(0.2, "Clip the policy's ratio at 1 - and 1 + this.", gt=0, lt=1)
    vf_coef: float = _setting(
        0.1,
        "Weight of the critic's loss. It does next to nothing: the critic has an AdamW of its own, which "
        "is blind to a factor on its gradient, but for --max_grad_norm; use --critic_learning_rate.",
        gt=0,
    )
    cliprange_value: float = _setting(
        0.2, "How far a value may move from the one before the step; beyond, it earns nothing.", ge=0
    )
    gamma: float = _setting(
        1.0,
        "Discount of rewards, per token. A completion that reached the length limit counts as ended: no "
        "value of what could have followed is added.",
        ge=0,
        le=1,
    )
    lam: float = _setting(0.95, "Lambda of generalised advantage estimation.", ge=0, le=1)
    whiten_rewards: bool = _setting(
        False, "Bring the rewards of the tokens of a generation to a spread of 1; their mean stays."
    )
    missing_eos_penalty: float | None = _setting(
        None, "Taken off the reward of a completion that reached the length limit. Not set: nothing.", ge=0
    )
    critic_learning_rate: float | None = _setting(
        None, "Peak learning rate of the critic. Not set: --learning_rate.", gt=0
    )
    num_generations: int = _setting(1, "Completions per prompt.", ge=1)
    loss_type: str = _setting("ppo", "PPO takes the mean over the tokens of a step: ppo.")
    advantage_estimator: str = _setting("gae", "PPO compares with a critic: gae.")
    kl_in_reward: bool | None = _setting(True, "PPO has the KL in the reward: true.")
    scale_rewards: Literal["group", "batch", "none"] = _setting(
        "none", "PPO compares with the critic, not within groups: none."
    )
    critic_workers: int | None = _cluster(
        None, "Ranks that train the critic. Not set: chosen from what the cluster has.", ge=1
    )
    gpus_per_critic_worker: float | None = _cluster(
        None, "GPUs of one critic worker. Not set: chosen from what the cluster has.", ge=0
    )
    cpus_per_critic_worker: float | None = _cluster(
        None, "CPU cores of one critic worker. Not set: chosen from what the cluster has.", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _under_grpos_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        twins = {theirs: values.get(ours, cls.model_fields[ours].default) for theirs, ours in TWINS.items()}
        return {**twins, **values}

    @model_validator(mode="after")
    def _check_ppo(self) -> Self:
        for theirs, ours in TWINS.items():
            if getattr(self, theirs) != getattr(self, ours):
                raise ConfigError(f"--{theirs} is GRPO's; in PPO it is --{ours}, {getattr(self, ours)} here.")
        for name in NOT_PPO:
            given = getattr(self, name)
            if given != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ConfigError(
                    f"--{name} {given} is a choice of GRPO's; PPO has none there: leave it out."
                )
        sizes = [n for n in ("steps_per_generation", "generation_batch_size") if getattr(self, n) is not None]
        if sizes and self.num_mini_batches > 1:
            raise ConfigError(
                f"--num_mini_batches {self.num_mini_batches} and --{sizes[0]} {getattr(self, sizes[0])} set "
                "the same thing: give only one of the two."
            )
        return self
