"""The policy as a loss asks it before a step, over flat arrays of one process, for the tests here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from raytune_rl.algorithms import entropy
from raytune_rl.algorithms.before_step import OnlineStep
from raytune_rl.algorithms.covariance import token_keys
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.protocol.train import TokenOrder


class LocalModels:
    """See `algorithms.before_step.StepModels`; `ranks` says which rows each of several ranks counts."""

    def __init__(self, inputs: LossInputs, step: OnlineStep, ranks: Sequence[Sequence[int]] | None = None):
        self.inputs, self.step = inputs, step
        self.ranks = [range(inputs.n_rows)] if ranks is None else ranks
        self.asked: list[TokenOrder] = []

    def _rows(self, column: torch.Tensor) -> list[np.ndarray]:
        flat, row_of = column.detach().numpy(), self.inputs.row_of.numpy()
        return [flat[row_of == row] for row in range(self.inputs.n_rows)]

    def log_ratios(self) -> np.ndarray:
        old = self.inputs.columns.get("old_logprobs", self.inputs.logprobs)
        return np.array([row.sum() for row in self._rows(self.inputs.logprobs - old)])

    def logprobs(self) -> np.ndarray:
        return np.array([row.sum() for row in self._rows(self.inputs.logprobs)])

    def first_tokens(self, order: TokenOrder, count: int) -> list[np.ndarray]:
        self.asked.append(order)
        keys = [
            token_keys(row, float(self.step.advantages[number]), number, order)
            for number, row in enumerate(self._rows(self.inputs.logprobs))
        ]
        shares = [
            np.concatenate([*(keys[row] for row in rank if self.step.lengths[row]), np.empty(0, np.float32)])
            for rank in self.ranks
        ]
        coarse = entropy.merge(entropy.count_high(share) for share in shares)
        high = entropy.find(coarse, min(count, int(coarse.sum())) - 1)
        fine = entropy.merge(entropy.count_low(share, high.index) for share in shares)
        last = np.float32(entropy.value(high.index, entropy.find(fine, high.rest).index))
        return [(np.isfinite(k) & (k <= last)).astype(np.float32) for k in keys]


def step_of(inputs: LossInputs, groups: Sequence[int], number: int = 3) -> OnlineStep:
    """The step of these inputs, whose rows have one advantage each."""
    assert inputs.advantages is not None
    lengths = np.bincount(inputs.row_of.numpy(), minlength=inputs.n_rows)
    advantages = np.zeros(inputs.n_rows)
    advantages[inputs.row_of.numpy()] = inputs.advantages.numpy()
    return OnlineStep(number, 42, np.asarray(groups), advantages, lengths)


def prepared(
    name: str,
    inputs: LossInputs,
    groups: Sequence[int],
    ranks: Sequence[Sequence[int]] | None = None,
    number: int = 3,
) -> LossInputs:
    """The inputs with what the loss works out of the whole step first."""
    before_step = get_loss(name).before_step
    if before_step is None:
        return inputs
    step = step_of(inputs, groups, number)
    values = before_step.prepare(inputs.settings, step, LocalModels(inputs, step, ranks))
    assert {*values.row_values, *values.columns} == before_step.gives
    columns = {
        n: torch.from_numpy(np.concatenate(c)).to(inputs.logprobs.dtype) for n, c in values.columns.items()
    }
    row_values = {n: torch.from_numpy(np.asarray(v)) for n, v in values.row_values.items()}
    return replace(
        inputs,
        columns={**inputs.columns, **columns},
        row_values={**inputs.row_values, **row_values},
    )
