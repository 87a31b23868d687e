"""A small optimizer step of ragged rows in float64, whole or cut into micro-batches, for the tests here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.algorithms.registry import LossInputs, get_loss

F64 = torch.float64


def rows_of(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


def make_step(
    lengths: Sequence[int],
    settings: Any,
    *,
    seed: int = 4,
    spread: float = 0.5,
    advantages: Sequence[float] | None = None,
    **row_values: Sequence[float],
) -> LossInputs:
    """Random log-probs of policy, old policy, reference and engine over rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def noise() -> Tensor:
        return spread * torch.randn(n, generator=generator, dtype=F64)

    logprobs = -torch.rand(n, generator=generator, dtype=F64) * 3
    old = logprobs + noise()
    columns = {"old_logprobs": old, "ref_logprobs": logprobs + noise(), "rollout_logprobs": old + noise()}
    row_of = rows_of(lengths)
    given = None if advantages is None else torch.tensor(advantages, dtype=F64)[row_of]
    values = {name: torch.as_tensor(v, dtype=F64) for name, v in row_values.items()}
    return LossInputs(
        logprobs.requires_grad_(), row_of, len(lengths), settings, columns, given, row_values=values
    )


def make_pairs(lengths: Sequence[int], settings: Any, **more: Any) -> LossInputs:
    return make_step(lengths, settings, **{PAIR: pair_numbers(len(lengths) // 2)}, **more)


def take(inputs: LossInputs, rows: Sequence[int]) -> tuple[LossInputs, Tensor]:
    """The micro-batch of these rows, in this order, and its tokens' numbers in the step."""
    tokens = [torch.nonzero(inputs.row_of == row).flatten() for row in rows]
    pick = torch.cat([*tokens, torch.zeros(0, dtype=torch.long)])
    whose = torch.tensor(rows, dtype=torch.long)
    part = replace(
        inputs,
        logprobs=inputs.logprobs[pick] if len(inputs.logprobs) else inputs.logprobs,
        row_of=rows_of([len(t) for t in tokens]) if rows else torch.zeros(0, dtype=torch.long),
        n_rows=len(rows),
        columns={name: column[pick] for name, column in inputs.columns.items()},
        advantages=None if inputs.advantages is None else inputs.advantages[pick],
        entropy=None if inputs.entropy is None else inputs.entropy[pick],
        row_values={name: values[whose] for name, values in inputs.row_values.items()},
        scores=None if inputs.scores is None else inputs.scores[whose],
        values=None if inputs.values is None else inputs.values[pick],
    )
    return part, pick


def step_result(
    name: str,
    inputs: LossInputs,
    weight: Any,
    row_weight: Any | None = None,
    cut: Sequence[Sequence[int]] | None = None,
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient with respect to the model's output, and metrics of a step, whole or cut."""
    weight = torch.as_tensor(weight, dtype=F64)
    row_weight = torch.zeros_like(weight) if row_weight is None else torch.as_tensor(row_weight, dtype=F64)
    leaf = next(t for t in (inputs.scores, inputs.values, inputs.logprobs) if t is not None)
    total, metrics = torch.zeros((), dtype=F64), MetricSums()
    for rows in [list(range(inputs.n_rows))] if cut is None else cut:
        part, _ = take(inputs, rows)
        output = get_loss(name)(part)
        whose = torch.tensor(rows, dtype=torch.long)
        pieces = []
        if output.token_loss is not None:
            pieces.append((weight[whose][part.row_of] * output.token_loss).sum())
        if output.row_loss is not None:
            assert output.row_loss.shape == (len(rows),)
            pieces.append((row_weight[whose] * output.row_loss).sum())
        total = total + sum(pieces)
        metrics = metrics.merge(output.metrics.host())
    (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
    return total.item(), grad, metrics.result()
