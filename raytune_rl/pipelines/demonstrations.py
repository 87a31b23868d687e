"""Answers of the data as completions: the off-policy share of distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raytune_rl.algorithms.experience import Experience
from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.data.sampler import stretch
from raytune_rl.prepare.sets import token_sets
from raytune_rl.protocol.data import TokenSet
from raytune_rl.protocol.rewards import RewardTable
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory


def demonstrated_rows(config: RLHFConfig, dataset: Sequence[str] | None = None) -> SFTConfig:
    """How rows are read as conversations to imitate in an online run: the answer after the last user turn,
    and as many tokens as a prompt and a completion may have together.

    Args:
        config: Of the run.
        dataset: They; None: those of the run itself.
    """
    shared = SFTConfig.model_fields.keys() & type(config).model_fields.keys()
    given: dict[str, Any] = {name: getattr(config, name) for name in shared if config.is_set(name)}
    given |= {"loss_scale": "last_round", "truncation_strategy": "delete", "dry_run": False}
    if dataset is not None:
        given = {name: value for name, value in given.items() if name not in _OF_THE_PROMPTS}
        given["dataset"] = tuple(dataset)
    if config.max_length is not None:
        given["max_length"] = config.max_length + config.max_completion_length
    return SFTConfig(**given)


@dataclass(frozen=True)
class Demonstrations:
    """Which generations train on the data's answers, and on which of them.

    Attributes:
        rows: The conversations.
        lmbda: Probability that a generation is sampled from the policy instead.
        count: Rows of a generation.
        seed, shuffle: Of the order.
    """

    rows: TokenSet
    lmbda: float
    count: int
    seed: int
    shuffle: bool
    _shown_before: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)

    def due(self, generation: int) -> bool:
        """Whether this generation is one of them: the same in every run of the seed."""
        return bool(np.random.default_rng([self.seed, generation, _DRAW]).random() >= self.lmbda)

    def of(self, generation: int, version: int) -> Experience:
        """The rows of a generation as trajectories; rewards are 0, as nobody asks for any."""
        shown = self._shown_before  # by generation, as far as it was counted
        while len(shown) <= generation:
            shown.append(shown[-1] + self.due(len(shown) - 1))
        start = self.count * shown[generation]
        chosen = stretch(len(self.rows), start, self.count, self.seed, self.shuffle)
        batch = [
            Trajectory(
                prompt=-1,
                group=group,
                data=RowPointer(self.rows.columns, int(row)),
                text=RowPointer(None, 0),
                episode=EpisodeFacts(
                    prompt_id=group,
                    sample=0,
                    row=int(row),
                    prompt_tokens=int(self.rows.lengths[row] - self.rows.loss_lengths[row]),
                    completion_tokens=int(self.rows.loss_lengths[row]),
                    finish_reason="stop",
                    version=version,
                ),
            )
            for group, row in enumerate(chosen)
        ]
        return Experience(batch, RewardTable((), (), np.zeros((len(batch), 0)), ()), np.zeros(len(batch)))


def demonstrations_of(
    config: RLHFConfig, count: int, quarantine: Path, *, one_machine: bool, tell: Callable[[str], None]
) -> Demonstrations:
    """Reads and tokenizes the conversations.

    Args:
        config: Of the run.
        count: Rows of a generation.
        quarantine, one_machine, tell: As in `prepare.sets.token_sets`.
    """
    rows, _ = token_sets(demonstrated_rows(config), "sft", quarantine, one_machine=one_machine, tell=tell)
    return Demonstrations(rows, config.lmbda, count, config.data_seed, config.dataset_shuffle)


_DRAW = 0x6B64
"""Sets these draws apart from others of the same seed."""

_OF_THE_PROMPTS = ("val_dataset", "split_dataset_ratio", "eval_strategy", "eval_steps")
"""Settings that belong to the run's own data."""
