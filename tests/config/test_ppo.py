"""PPO's config: its flags stand for GRPO's, and those of GRPO that it has not are refused."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.config import PPOConfig, RLHFConfig, resolved
from raytune_rl.config.batching import grpo_batch_of
from raytune_rl.config.parser import parse, rlhf_class
from raytune_rl.errors import ConfigError

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": ["accuracy"]}


def test_defaults_are_trls() -> None:
    config = PPOConfig(**GIVEN)
    assert config.rlhf_type == "ppo"
    settings = (
        config.num_ppo_epochs,
        config.num_mini_batches,
        config.kl_coef,
        config.cliprange,
        config.vf_coef,
    )
    assert settings == (4, 1, 0.05, 0.2, 0.1)
    assert (config.cliprange_value, config.gamma, config.lam) == (0.2, 1.0, 0.95)
    assert (config.whiten_rewards, config.missing_eos_penalty) == (False, None)
    assert config.num_generations == 1
    assert resolved.critic_learning_rate(config) == resolved.learning_rate(config)
    assert resolved.critic_learning_rate(PPOConfig(**GIVEN, critic_learning_rate=0.5)) == 0.5


def test_its_names_stand_for_grpos() -> None:
    config = PPOConfig(**GIVEN, kl_coef=0.3, cliprange=0.1, num_ppo_epochs=2)
    assert (config.beta, config.epsilon, config.num_iterations) == (0.3, 0.1, 2)
    assert resolved.kl_in_reward(config)
    assert PPOConfig(**config.args()) == config, "what args.json says can be said again"


def test_a_generation_holds_all_mini_batches() -> None:
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    batch = grpo_batch_of(PPOConfig(**GIVEN, **more, num_mini_batches=3), 2)
    assert batch.generation_batch_size == 48
    assert batch.optimizer_steps_per_generation == 3
    assert batch.num_iterations == 4
    assert grpo_batch_of(PPOConfig(**GIVEN, **more), 2).optimizer_steps_per_generation == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.1}, "--beta is GRPO's; in PPO it is --kl_coef, 0.05 here"),
        ({"epsilon": 0.1, "cliprange": 0.3}, "in PPO it is --cliprange, 0.3 here"),
        ({"loss_type": "grpo"}, "--loss_type grpo is a choice of GRPO's"),
        ({"dynamic_sample": True}, "--dynamic_sample True"),
        ({"num_mini_batches": 2, "steps_per_generation": 2}, "set the same thing"),
        ({"reward_funcs": []}, "--reward_funcs is required.*--reward_model"),
        ({"gamma": 1.5}, "--gamma"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**{**GIVEN, **settings})


def test_the_command_line_knows_it() -> None:
    words = [
        "--rlhf_type",
        "ppo",
        "--model",
        "m",
        "--dataset",
        "d",
        "--reward_model",
        "rm",
        "--kl_coef",
        "0.1",
    ]
    assert rlhf_class(words) is PPOConfig
    config = parse(words, rlhf_class(words), environ={}).config
    assert isinstance(config, PPOConfig)
    assert (config.beta, config.reward_model) == (0.1, ("rm",))
    with pytest.raises(ConfigError, match=r"--kl_coef is no flag of raytune-rl rlhf, but of rlhf .*ppo"):
        parse(["--model", "m", "--kl_coef", "0.1"], RLHFConfig, environ={})
    with pytest.raises(ConfigError, match="make a PPOConfig"):
        RLHFConfig(**GIVEN, rlhf_type="ppo")


def test_reward_models_count_as_rewards() -> None:
    models = {"reward_model": ["a", "b"]}
    assert resolved.reward_weights(RLHFConfig(**GIVEN, **models)) == (1.0, 1.0, 1.0)
    config = RLHFConfig(**{**GIVEN, **models, "reward_funcs": [], "reward_weights": [0.5, 2]})
    assert resolved.reward_weights(config) == (0.5, 2.0)
    with pytest.raises(ConfigError, match="2 values but --reward_funcs names 1 and --reward_model 2"):
        RLHFConfig(**GIVEN, **models, reward_weights=[1, 1])
    with pytest.raises(ConfigError, match="--reward_model_plugin has 1 values for 2"):
        RLHFConfig(**GIVEN, **models, reward_model_plugin=["default"])
    both = PPOConfig(**GIVEN, **models, reward_model_plugin=["genrm", "default"])
    assert resolved.critic_start(both) == "b"
    assert (
        resolved.critic_start(PPOConfig(**GIVEN, reward_model=["a"], reward_model_plugin=["genrm"])) is None
    )
