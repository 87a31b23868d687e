"""PPO raises the expected reward on problems that nobody trained on, and its critic learns to foresee it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.config import PPOConfig
from raytune_rl.tiny.arithmetic import problems
from raytune_rl.tiny.model import make_tiny_model
from tests.learning.critic_loop import Critic, reinforce_with_critic
from tests.learning.loop import Policy, Spoiled
from tests.learning.test_every_algorithm_learns import slip


@pytest.mark.learning
def test_it_learns_and_what_is_broken_does_not(tmp_path: Path) -> None:
    policy = Policy(make_tiny_model(tmp_path / "tiny", hidden=128, layers=2))
    rng = random.Random(0)
    pool = problems()
    rng.shuffle(pool)
    held_out, seen = pool[:64], pool[64:]
    taught = rng.choices(seen, k=2048)
    answers = [p.answer if rng.random() < 0.5 else slip(p.answer, rng) for p in taught]
    torch.manual_seed(0)
    policy.imitate(taught, answers, steps=200, rate=4e-3)
    start = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    before = policy.rightness(held_out)
    assert 0.3 < before < 0.65

    def gain(spoiled: Spoiled | None = None, **flags: Any) -> tuple[float, list[dict[str, float]]]:
        policy.model.load_state_dict(start)
        config = PPOConfig(
            **{
                "model": "tiny",
                "dataset": "arithmetic",
                "reward_funcs": "accuracy",
                "max_completion_length": 20,
                "num_ppo_epochs": 2,
                "learning_rate": 4e-4,
                "critic_learning_rate": 1e-3,
                **flags,
            }
        )
        torch.manual_seed(1)
        critic = Critic(policy, tmp_path / "start")
        history = reinforce_with_critic(policy, critic, config, seen, 5, 128, spoiled)
        return policy.rightness(held_out) - before, history

    learned, history = gain()
    assert learned > 0.15
    assert history[0]["value"] == 0, "a new critic foresees nothing"
    assert history[-1]["val/error"] < 0.7 * history[0]["val/error"]
    assert gain(whiten_rewards=True, kl_coef=0.0)[0] > 0.15
    assert gain(Spoiled(advantages=lambda a: -a))[0] < -0.1
    assert gain(Spoiled(advantages=lambda a: np.roll(a, 20)))[0] < 0.1
