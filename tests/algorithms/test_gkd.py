"""The loss of GKD around the divergence, which `tests/models/test_distribution.py` holds."""

from __future__ import annotations

import pytest
import torch

from raytune_rl.algorithms.losses.gkd import GKD, GKDSettings
from raytune_rl.algorithms.registry import LossInputs


def inputs(settings: GKDSettings, off_policy: list[float] | None) -> LossInputs:
    divergence = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    return LossInputs(
        logprobs=torch.tensor([-1.0, -2.0, -4.0], requires_grad=True),
        row_of=torch.tensor([0, 0, 1]),
        n_rows=2,
        settings=settings,
        columns={"teacher_ids": torch.zeros(3), "teacher_top_logprobs": torch.zeros(3)},
        advantages=torch.zeros(3),
        row_values={} if off_policy is None else {"off_policy": torch.tensor(off_policy)},
        divergence=divergence,
    )


def test_it_is_the_divergence_whatever_the_advantages_say() -> None:
    output = GKD(inputs(GKDSettings(), [0.0, 1.0]))
    assert output.token_loss is not None
    assert output.token_loss.tolist() == [0.5, 0.25, 1.0]
    assert output.metrics.result()["gkd/divergence"] == pytest.approx(1.75 / 3)


def test_the_datas_own_answers_are_learned_too_where_asked() -> None:
    given = inputs(GKDSettings(sft_alpha=0.1), [0.0, 1.0])
    output = GKD(given)
    assert output.token_loss is not None
    assert output.token_loss.tolist() == pytest.approx([0.5, 0.25, 1.4])
    output.token_loss.sum().backward()
    assert given.logprobs.grad is not None
    assert given.logprobs.grad.tolist() == pytest.approx([0, 0, -0.1])
    own = GKD(inputs(GKDSettings(sft_alpha=0.1), [0.0, 0.0])).token_loss
    assert own is not None
    assert own.tolist() == [0.5, 0.25, 1.0]
