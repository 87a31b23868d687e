"""Row weights: the formulas, and that any split into micro-batches gives the same loss and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.registry import online_losses
from raytune_rl.errors import ConfigError

LENGTHS = [3, 0, 8, 1, 5, 2]


def test_closed_forms() -> None:
    assert row_weights([2, 4], "grpo").tolist() == [1 / 4, 1 / 8]
    assert row_weights([2, 4], "dr_grpo", 10).tolist() == [1 / 20, 1 / 20]
    for token_mean in ("dapo", "bnpo", "sft"):
        assert row_weights([2, 4], token_mean).tolist() == [1 / 6, 1 / 6]


LOSS_TYPES = (*(loss.name for loss in online_losses()), "sft")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_constant_token_loss(loss_type: str) -> None:
    """Mean-like types give back the constant; a row without tokens counts in n but adds nothing."""
    total = float(np.sum(row_weights(LENGTHS, loss_type, 8) * np.array(LENGTHS)))
    expected = {
        **dict.fromkeys(("grpo", "sapo", "gmpo", "real", "chord"), 5 / 6),
        "dr_grpo": 19 / 48,
        "luspo": 19 / 6,
    }.get(loss_type, 1.0)
    assert total == pytest.approx(expected)
    assert row_weights(LENGTHS, loss_type, 8)[1] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("empty", [[], [0], [0, 0]])
def test_nothing_to_weigh(loss_type: str, empty: list[int]) -> None:
    assert row_weights(empty, loss_type, 8).tolist() == [0.0] * len(empty)


def test_definitions_on_real_losses() -> None:
    rng = np.random.default_rng(1)
    losses = [rng.normal(size=n) for n in LENGTHS]

    def total(loss_type: str) -> float:
        weights = row_weights(LENGTHS, loss_type, 8)
        return float(sum(w * row.sum() for w, row in zip(weights, losses, strict=True)))

    assert total("grpo") == pytest.approx(np.mean([row.mean() if len(row) else 0.0 for row in losses]))
    assert total("dapo") == pytest.approx(np.concatenate(losses).mean())
    assert total("dr_grpo") == pytest.approx(np.concatenate(losses).sum() / (6 * 8))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "split",
    [[[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 0], [2], [4, 1, 3]], [[1], [3, 5, 2, 0, 4]]],
)
def test_any_split_gives_the_same_loss_and_gradient(loss_type: str, split: list[list[int]]) -> None:
    weights = torch.from_numpy(row_weights(LENGTHS, loss_type, 8))
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 8, 4, generator=generator, dtype=torch.float64)

    def run(parts: list[list[int]]) -> tuple[float, torch.Tensor]:
        theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
        value = 0.0
        for rows in parts:  # one backward a micro-batch, gradients add up
            flat = torch.cat([table[row, : LENGTHS[row]] for row in rows])
            row_of = torch.repeat_interleave(torch.tensor(rows), torch.tensor([LENGTHS[row] for row in rows]))
            token_loss = torch.tanh(flat @ theta) ** 2
            loss = (weights[row_of] * token_loss).sum()
            loss.backward()
            value += loss.item()
        assert theta.grad is not None
        return value, theta.grad

    value, grad = run(split)
    want, want_grad = run([list(range(6))])
    assert value == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-14)
    assert grad.abs().sum() > 0


def test_permutation() -> None:
    order = [4, 2, 0, 5, 1, 3]
    for loss_type in LOSS_TYPES:
        weights = row_weights(LENGTHS, loss_type, 8)
        shuffled = row_weights([LENGTHS[i] for i in order], loss_type, 8)
        assert shuffled.tolist() == weights[order].tolist()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="max_completion_length"):
        row_weights([1], "dr_grpo")
    with pytest.raises(ConfigError, match="'mean' is no way in which losses add up"):
        row_weights([1], "mean")
