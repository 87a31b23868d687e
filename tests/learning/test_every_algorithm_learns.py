"""On the arithmetic task every algorithm raises the expected reward on problems that nobody trained on.

A real policy (0.4 M parameters, warmed up with a teacher who errs in half of his answers) samples for real;
flags become losses as in the pipeline. What would break learning is tried as well: it must be noticed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from raytune_rl.tiny.arithmetic import Problem, problems, question
from raytune_rl.tiny.model import make_tiny_model
from tests.learning.loop import Policy, Spoiled, reinforce

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.01},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "overlong_filter": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "fipo": {"loss_type": "fipo", "epsilon_high": 0.28},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo_token": {"importance_sampling_level": "sequence_token"},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus"},
}
GENERATIONS, PROMPTS = 4, 16
HELD_OUT = 64


@dataclass(frozen=True)
class Task:
    """A warmed-up policy and disjoint problems."""

    policy: Policy
    start: dict[str, torch.Tensor]
    held_out: list[Problem]
    seen: list[Problem]

    def gain(self, flags: dict[str, Any], spoiled: Spoiled | None = None) -> float:
        """The gain of training in the expected reward on the held-out problems."""
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
        history = reinforce(self.policy, config, self.seen, GENERATIONS, PROMPTS, spoiled)
        assert len(history) == 2 * GENERATIONS
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
    held_out, seen = pool[:HELD_OUT], pool[HELD_OUT:]
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


@pytest.mark.cluster
@pytest.mark.learning
@pytest.mark.timeout(300)
def test_dapo_learns_on_the_real_stack(task: Task, tmp_path: Path) -> None:
    """The recipe with dynamic sampling: DeepSpeed, vLLM and reward workers in Ray actors."""
    task.policy.model.load_state_dict(task.start)
    task.policy.model.save_pretrained(tmp_path / "model")
    task.policy.tokenizer.save_pretrained(tmp_path / "model")
    for name, part in (("train", task.seen[:256]), ("held_out", task.held_out)):
        rows = [
            {
                "messages": [{"role": "user", "content": question(p, in_words=False)}],
                "solution": str(p.answer),
            }
            for p in part
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = online.run(
        RLHFConfig(
            rlhf_type="dapo",
            model=str(tmp_path / "model"),
            dataset=str(tmp_path / "train.jsonl"),
            val_dataset=str(tmp_path / "held_out.jsonl"),
            reward_funcs=["accuracy", "soft_overlong"],
            soft_cache_length=8,
            max_completion_length=32,
            train_type="full",
            num_generations=8,
            num_generations_eval=4,
            per_device_train_batch_size=128,
            temperature=1.0,
            learning_rate=4e-4,
            lr_scheduler_type="constant",
            max_steps=5,
            eval_steps=5,
            save_only_model=True,
            logging_steps=1,
            report_to="none",
            output_dir=str(tmp_path / "out"),
        )
    )
    name = "eval_rewards/MathAccuracy/mean"
    assert result.after[name] > result.before[name] + 0.15
    lines = [json.loads(line) for line in (result.run_dir / "logging.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "dynamic_sample/rounds" in line]
    assert len(trained) == 5
    assert sum(line["dynamic_sample/replaced_prompts"] for line in trained) > 0
    assert all(
        line["frac_reward_zero_std"] * 16 == line["dynamic_sample/filled_without_signal"] for line in trained
    )
