"""On the arithmetic task every algorithm raises the expected reward on problems that nobody trained on.

A real policy (0.4 M parameters, warmed up with a teacher who errs in half of his answers) samples for real;
flags become losses as in the pipeline. What would break learning is tried as well: it must be noticed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.config import RLHFConfig
from raytune_rl.tiny.arithmetic import Problem, problems
from raytune_rl.tiny.model import make_tiny_model
from tests.learning.loop import Policy, Spoiled, reinforce

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.01},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "overlong_filter": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo_token": {"importance_sampling_level": "sequence_token"},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus"},
}
GENERATIONS, PROMPTS = 4, 16


@dataclass(frozen=True)
class Task:
    """A warmed-up policy and disjoint problems."""

    policy: Policy
    start: dict[str, torch.Tensor]
    held_out: list[Problem]
    seen: list[Problem]

    def gain(self, flags: dict[str, Any], spoiled: Spoiled | None = None) -> float:
        """What training adds to the expected reward on the held-out problems."""
        self.policy.model.load_state_dict(self.start)
        torch.manual_seed(1)
        config = RLHFConfig(
            **{
                "model": "tiny",
                "dataset": "arithmetic",
                "reward_funcs": "accuracy",
                "num_generations": 8,
                "max_completion_length": 20,
                "num_iterations": 2,
                "beta": 0.0,
                "learning_rate": 4e-4,
                **flags,
            }
        )
        before = self.policy.rightness(self.held_out)
        told = reinforce(self.policy, config, self.seen, GENERATIONS, PROMPTS, spoiled)
        assert len(told) == 2 * GENERATIONS
        return self.policy.rightness(self.held_out) - before


def slip(answer: int, rng: random.Random) -> int:
    """One of the two digits is drawn anew."""
    if rng.random() < 0.5:
        return answer % 10 + 10 * rng.randrange(1, 10)
    return answer // 10 * 10 + rng.randrange(10)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = make_tiny_model(tmp_path_factory.mktemp("learning") / "tiny", hidden=128, layers=2)
    policy = Policy(path)
    rng = random.Random(0)
    pool = problems()
    rng.shuffle(pool)
    held_out, seen = pool[:64], pool[64:]
    taught = rng.choices(seen, k=2048)
    answers = [p.answer if rng.random() < 0.5 else slip(p.answer, rng) for p in taught]
    torch.manual_seed(0)
    policy.imitate(taught, answers, steps=200, rate=4e-3)
    start = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    assert 0.3 < policy.rightness(held_out) < 0.65, "it has learned to add, and to err like its teacher"
    return Task(policy, start, held_out, seen)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns(task: Task, name: str) -> None:
    assert task.gain(ALGORITHMS[name]) > 0.2


@pytest.mark.parametrize(
    ("spoiled", "worst", "best"),
    [
        (Spoiled(advantages=lambda a: -a), -1.0, -0.1),
        (Spoiled(advantages=lambda a: np.roll(a, 1)), -1.0, 0.1),
        (Spoiled(masks=lambda m: np.arange(len(m)) * ~m > 0), -1.0, 0.1),
    ],
    ids=["the sign is flipped", "the neighbour's advantage", "the prompt is trained on"],
)
def test_what_is_broken_does_not(task: Task, spoiled: Spoiled, worst: float, best: float) -> None:
    assert worst <= task.gain(ALGORITHMS["grpo"], spoiled) < best
