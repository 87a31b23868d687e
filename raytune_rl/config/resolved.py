"""Defaults that depend on other settings, as pure functions of the config.

The config keeps what the user asked for; these say what it comes to. Nothing here looks at the machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from raytune_rl.config import algorithms, cluster
from raytune_rl.config.asynchrony import staleness_bound
from raytune_rl.config.commands import PPOConfig, RLHFConfig, TrainConfig
from raytune_rl.config.training import Strategy


def learning_rate(config: TrainConfig) -> float:
    """1e-5 for full training and 1e-4 for an adapter, unless given."""
    if config.learning_rate is not None:
        return config.learning_rate
    return 1e-5 if config.train_type == "full" else 1e-4


def dataset_cache_dir(config: TrainConfig) -> str:
    """Where encoded data lies: as given, else by RAYTUNE_RL_CACHE, else in the user's cache folder."""
    named = config.dataset_cache_dir or os.environ.get("RAYTUNE_RL_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.abspath(os.path.expanduser(named or Path(home) / "raytune_rl"))  # noqa: PTH100, PTH111


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps in which the learning rate rises."""
    if config.warmup_steps > 0:
        return config.warmup_steps
    # As Transformers does: rounded up.
    return -int(-config.warmup_ratio * total_steps // 1)


def eval_strategy(config: TrainConfig) -> Strategy:
    """As `save_strategy`, unless given."""
    return config.eval_strategy or config.save_strategy


def eval_steps(config: TrainConfig) -> int:
    """As `save_steps`, unless given."""
    return config.save_steps if config.eval_steps is None else config.eval_steps


def evaluates(config: TrainConfig) -> bool:
    """Whether the run evaluates at any time: there are rows for it, and the user does not refuse."""
    return has_validation(config) and eval_strategy(config) != "no"


def checkpoint_interval(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps from one checkpoint to the next, where there are any."""
    return steps_per_epoch if config.save_strategy == "epoch" else config.save_steps


def evaluation_interval(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps from one evaluation to the next, where there are any."""
    return steps_per_epoch if eval_strategy(config) == "epoch" else eval_steps(config)


def truncation_strategy(config: TrainConfig) -> str:
    """`left` in online RL and `delete` otherwise, unless given."""
    if config.truncation_strategy is not None:
        return config.truncation_strategy
    return "left" if config.ONLINE else "delete"


def attention(config: TrainConfig) -> str | None:
    """The name that Transformers knows; `None` where the user leaves the choice."""
    return "flash_attention_2" if config.attn_impl == "flash_attn" else config.attn_impl


def kl_in_reward(config: RLHFConfig) -> bool:
    """As the estimator's paper has it, unless given; without a KL there is none anywhere."""
    return algorithms.wants_kl_in_reward(config)


def kl_estimator(config: RLHFConfig) -> Literal["k1", "k2", "k3"]:
    """k1 in the reward, k3 in the loss, unless given."""
    return algorithms.kl_estimator(config)


def credit(config: RLHFConfig) -> str:
    """The name of who says what completions earned: ms-swift asks for GDPO by `scale_rewards`."""
    return "gdpo" if config.scale_rewards == "gdpo" else config.advantage_estimator


def num_generations_eval(config: RLHFConfig) -> int:
    """As `num_generations`, unless given."""
    return config.num_generations if config.num_generations_eval is None else config.num_generations_eval


def max_staleness(config: RLHFConfig) -> int:
    """Most weight versions between sampling and training; 0 in the synchronous loop."""
    return staleness_bound(config)


def rollout_correction(config: RLHFConfig) -> str | None:
    """Of each token, cut at the threshold, where completions may be of older weights; none in the synchronous
    loop; unless given."""
    return algorithms.rollout_correction(config)


def eval_temperature(config: RLHFConfig) -> float:
    """As in training, unless given; 0 is greedy."""
    return config.temperature if config.eval_temperature is None else config.eval_temperature


def reward_weights(config: RLHFConfig) -> tuple[float, ...]:
    """One weight per reward function, then one per reward model, 1 unless given."""
    return config.reward_weights or (1.0,) * (len(config.reward_funcs) + len(config.reward_model))


def critic_learning_rate(config: PPOConfig) -> float:
    """As `learning_rate`, unless given."""
    return learning_rate(config) if config.critic_learning_rate is None else config.critic_learning_rate


def critic_start(config: PPOConfig) -> str | None:
    """The first reward model that is asked for its score: where the critic starts from; None without one."""
    plugins = config.reward_model_plugin or ("default",) * len(config.reward_model)
    models = (
        model for model, plugin in zip(config.reward_model, plugins, strict=True) if plugin == "default"
    )
    return next(models, None)


def colocate(config: RLHFConfig) -> bool | None:
    """Whether rollout shares the policy's GPUs, as the user says in either of two flags; `None`: not said."""
    if config.colocate is not None:
        return config.colocate
    return None if config.vllm_mode is None else config.vllm_mode == "colocate"


def engines(config: RLHFConfig) -> tuple[int, int] | None:
    """The least and the most rollout workers, as the user says; `None`: not said."""
    return None if config.rollout_workers is None else cluster.engines(config.rollout_workers)


def engines_at_start(config: RLHFConfig) -> int | None:
    """Rollout workers that a run starts with, as the user says; `None`: not said."""
    asked = engines(config)
    return None if asked is None else asked[0]


def elastic(config: RLHFConfig) -> bool:
    """Whether rollout workers come and go."""
    return isinstance(config.rollout_workers, str)


def rollout_grow_after(config: RLHFConfig) -> float:
    """Seconds that prompts wait before more engines are asked for: 30, unless given."""
    return 30.0 if config.rollout_grow_after is None else config.rollout_grow_after


def rollout_shrink_after(config: RLHFConfig) -> float:
    """Seconds in which an engine is not needed before it is given back: 300, unless given."""
    return 300.0 if config.rollout_shrink_after is None else config.rollout_shrink_after


def has_validation(config: TrainConfig) -> bool:
    """Whether there are rows to evaluate on."""
    return bool(config.val_dataset) or config.split_dataset_ratio > 0
