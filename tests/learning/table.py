"""RL of a table of logits in one process, in milliseconds: real losses, credits and weights, and a policy
that is nothing but a distribution for each place of a completion.

The task: say the right symbol at each place, and stop at the right length. Which loss and which credit comes
from flags, as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.credit.base import Models
from raytune_rl.algorithms.credit.otb import otb_advantages
from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, ReverseKL
from raytune_rl.algorithms.experience import Experience
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.config import RLHFConfig
from raytune_rl.models.distribution import divergence
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.protocol.rewards import RewardTable
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory
from tests.algorithms.whole_step import prepared

PROMPTS, PER, PLACES, SYMBOLS, STOP = 4, 8, 4, 5, 0


class TablePolicy:
    """Logits `[prompts, places, symbols]`; symbol 0 ends a completion."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = (0.1 * torch.randn(PROMPTS, PLACES, SYMBOLS, generator=generator)).double()
        self.right = [
            [1 + (p + k) % (SYMBOLS - 1) for k in range(1 + p % (PLACES - 1))] for p in range(PROMPTS)
        ]
        with torch.no_grad():  # half way there, so that some completion of a group is right
            for prompt, answer in enumerate(self.right):
                for place, symbol in enumerate([*answer, STOP]):
                    self.logits[prompt, place, symbol] += 2.0
        self.logits.requires_grad_()

    def sample(self, generator: torch.Generator) -> list[tuple[int, list[int]]]:
        """`PER` completions of every prompt, stop symbols included."""
        chances = self.logits.detach().softmax(-1)
        made = []
        for prompt in range(PROMPTS):
            for _ in range(PER):
                drawn = torch.multinomial(chances[prompt], 1, generator=generator).flatten().tolist()
                length = drawn.index(STOP) + 1 if STOP in drawn else PLACES
                made.append((prompt, drawn[:length]))
        return made

    def logprobs(self, made: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor]:
        """Log-probs of the symbols, end to end, and the row of each."""
        logs = self.logits.log_softmax(-1)
        places = [(p, k, s) for p, said in made for k, s in enumerate(said)]
        row_of = [row for row, (_, said) in enumerate(made) for _ in said]
        prompt, place, symbol = (torch.tensor(x) for x in zip(*places, strict=True))
        return logs[prompt, place, symbol], torch.tensor(row_of)

    def teacher(self) -> Tensor:
        """Log-probs `[prompts, places, symbols]` of one who knows the right answers, and says them mostly."""
        logits = torch.zeros_like(self.logits)
        for prompt, answer in enumerate(self.right):
            for place, symbol in enumerate([*answer, STOP]):
                logits[prompt, place, symbol] = 4.0
        return logits.log_softmax(-1).detach()

    def said_by_a_teacher(self, made: list[tuple[int, list[int]]]) -> Tensor:
        """Its log-probs of the symbols, end to end."""
        logs = self.teacher()
        return torch.stack([logs[p, k, s] for p, said in made for k, s in enumerate(said)])

    def divergence(self, made: list[tuple[int, list[int]]], beta: float) -> Tensor:
        """How far the policy is from it at each symbol, end to end."""
        apart = divergence(self.logits.log_softmax(-1), self.teacher(), beta)
        return torch.stack([apart[p, k] for p, said in made for k in range(len(said))])

    def greedy(self) -> list[list[int]]:
        """The likeliest answer to each prompt, symbol by symbol."""
        found = []
        for symbols in self.logits.detach().argmax(-1).tolist():
            length = symbols.index(STOP) + 1 if STOP in symbols else PLACES
            found.append(symbols[:length])
        return found

    def rightness(self) -> float:
        """The expected reward, exactly."""
        chances = self.logits.detach().softmax(-1)
        return float(
            np.mean(
                [
                    float(torch.stack([chances[p, k, s] for k, s in enumerate([*answer, STOP])]).prod())
                    for p, answer in enumerate(self.right)
                ]
            )
        )


def experience_of(
    made: list[tuple[int, list[int]]], rewards: list[float], greedy: list[float] | None = None
) -> Experience:
    """What a credit sees of the completions; `greedy` are the rewards of the likeliest answers by prompt."""
    row = RowPointer("data", 0)
    batch = [
        Trajectory(
            prompt,
            prompt,
            row,
            row,
            EpisodeFacts(prompt, k, k, 1, len(said), "stop" if said[-1] == STOP else "length", 0),
        )
        for k, (prompt, said) in enumerate(made)
    ]
    values = np.asarray(rewards, dtype=np.float64)
    baseline = None if greedy is None else np.array([greedy[prompt] for prompt, _ in made])
    return Experience(batch, RewardTable(("Exact",), ("exact",), values[:, None], ()), values, baseline)


class TableModels:
    """The policy as a credit asks it; see `algorithms.credit.base.Models`."""

    def __init__(self, policy: TablePolicy, made: list[tuple[int, list[int]]]) -> None:
        self._policy, self._made = policy, made

    def token_baseline(self, batch: Any, rewards: np.ndarray, groups: list[int]) -> Any:
        """By `otb.otb_advantages`, the arrays themselves."""
        chances = self._policy.logits.detach().softmax(-1).numpy()
        logprobs = [[np.log(chances[p, k, s]) for k, s in enumerate(said)] for p, said in self._made]
        squares = [[(chances[p, k] ** 2).sum() for k in range(len(said))] for p, said in self._made]
        found: list[Any] = [None] * len(self._made)
        for group in set(groups):
            rows = [row for row, g in enumerate(groups) if g == group]
            of_group = otb_advantages(
                rewards[rows], [logprobs[row] for row in rows], [squares[row] for row in rows]
            )
            for row, earned in zip(rows, of_group, strict=True):
                found[row] = earned
        return found, np.array([row.mean() for row in found])


@dataclass(frozen=True)
class TableBatch:
    """A batch of which only its size and a column of advantages matter."""

    rows: int
    advantages: Any = None

    def __len__(self) -> int:
        return self.rows

    def with_columns(self, advantages: Any) -> TableBatch:
        """The same with that column."""
        return TableBatch(self.rows, advantages)


def gain(
    flags: dict[str, Any],
    generations: int = 12,
    spoil: Callable[[np.ndarray], np.ndarray] = lambda advantages: advantages,
    mislead: Callable[[Tensor], Tensor] = lambda logprobs: logprobs,
) -> float:
    """How much the expected reward rises.

    Args:
        flags: Of the algorithm.
        generations: Two steps each.
        spoil: A way to break the advantages.
        mislead: A way to break what a teacher says.
    """
    given = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "beta": 0.0, "num_iterations": 2}
    config = RLHFConfig(**{**given, "num_generations": PER, "max_completion_length": PLACES, **flags})
    algorithm = algorithm_of(config)
    loss = get_loss(algorithm.loss.name)
    settings = loss.settings_type(**algorithm.loss.settings)
    policy, generator = TablePolicy(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([policy.logits], 0.1)
    before = policy.rightness()
    for _ in range(generations):
        made = policy.sample(generator)
        rewards = [float(said == [*policy.right[p], STOP]) for p, said in made]
        models = cast(Models, TableModels(policy, made))
        likeliest = [float(said == [*policy.right[p], STOP]) for p, said in enumerate(policy.greedy())]
        credited = algorithm.credit.assign(
            experience_of(made, rewards, likeliest), cast(TrainBatch, TableBatch(len(made))), models
        )
        by_token = cast(TableBatch, credited.batch).advantages
        weights = torch.from_numpy(
            row_weights([len(said) for _, said in made], algorithm.loss.normaliser, PLACES)
        )
        with torch.no_grad():
            old, row_of = policy.logprobs(made)
            teacher = mislead(policy.said_by_a_teacher(made))
        advice = algorithm.credit.advice(0)
        if advice is None and "teacher_advantages" in algorithm.needs:
            advice = ReverseKL(config.teacher_kl_coef)
        if advice is not None:
            earned = spoil(credited.advantages)[row_of.numpy()]
            advantages = torch.from_numpy(advice(earned, teacher.numpy(), old.numpy())).double()
        elif by_token is None:
            advantages = torch.from_numpy(spoil(credited.advantages)).double()[row_of]
        else:
            advantages = torch.from_numpy(spoil(np.concatenate(by_token))).double()
        for _ in range(config.num_iterations):
            logprobs, _ = policy.logprobs(made)
            columns = {"old_logprobs": old, "rollout_logprobs": old, "ref_logprobs": old}
            columns["teacher_logprobs"] = teacher
            inputs = LossInputs(logprobs, row_of, len(made), settings, columns, advantages)
            if loss.divergence_beta is not None:
                apart = policy.divergence(made, loss.divergence_beta(settings))
                known = dict.fromkeys(TEACHER_COLUMNS, teacher)
                inputs = replace(inputs, divergence=apart, columns={**columns, **known})
            inputs = prepared(loss.name, inputs, [prompt for prompt, _ in made])
            row_weight = torch.full((len(made),), 1 / len(made), dtype=torch.float64)
            optimizer.zero_grad()
            loss(inputs).total(weights[row_of], row_weight).backward()
            optimizer.step()
    return policy.rightness() - before
