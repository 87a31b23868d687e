"""Every loss and every credit of online RL that needs no second model raises the expected reward of a table
of logits, and lowers it with its sign turned. With a real model, `test_every_algorithm_learns` does so for
what ms-swift has.
"""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.algorithms.credit.base import credit_names, is_built_in_credit
from raytune_rl.algorithms.registry import online_losses
from tests.learning.table import gain

NEEDS: dict[str, dict[str, Any]] = {
    "cispo": {"epsilon_high": 5.0},
    "pass_at_k": {"pass_k": 2},
    "chord": {"chord_sft_dataset": "d"},
    "sdar": {"teacher_model": "t"},
    "rlsd": {"teacher_model": "t"},
}
LOSSES = [loss.name for loss in online_losses() if loss.divergence_beta is None]
ANOTHERS = {"gae": "a critic", "distill": "a teacher"}
"""Credits without a reward of their own table: `test_ppo_learns`, and the teacher's below."""
CREDITS = [name for name in credit_names() if is_built_in_credit(name) and name not in ANOTHERS]
CASES = [("loss_type", name) for name in LOSSES] + [("advantage_estimator", name) for name in CREDITS]


@pytest.mark.parametrize(("flag", "name"), CASES)
def test_it_learns_and_with_its_sign_turned_it_unlearns(flag: str, name: str) -> None:
    flags = {flag: name, **NEEDS.get(name, {})}
    assert gain(flags) > 0.2
    assert gain(flags, spoil=lambda advantages: -advantages) < -0.05


def test_what_a_teacher_finds_likelier_is_learned_behind_its_gate() -> None:
    """SDAR without any reward; a teacher who says the opposite teaches nothing."""
    flags = {"loss_type": "sdar", "teacher_model": "t", "sdar_loss_coef": 1.0}
    assert gain(flags, spoil=lambda advantages: 0 * advantages) > 0.2
    wrong = gain(flags, spoil=lambda advantages: 0 * advantages, mislead=lambda said: -4 - said)
    assert wrong < 0.05


def test_a_teacher_says_which_tokens_made_it_right() -> None:
    """RLSD learns sooner from one who knows than from one who says the opposite."""
    flags = {"advantage_estimator": "rlsd", "teacher_model": "t", "rlsd_lambda": 1.0}
    flags |= {"rlsd_reweight_clip_range": 0.9}
    assert gain(flags, 4) > gain(flags, 4, mislead=lambda said: -4 - said) + 0.02


def test_a_teachers_opinion_alone_teaches_and_the_opposite_unlearns() -> None:
    flags = {"advantage_estimator": "distill", "teacher_model": "t"}
    assert gain(flags) > 0.2
    assert gain(flags, mislead=lambda said: -4 - said) < -0.05


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teachers_distribution_teaches(beta: float) -> None:
    assert gain({"rlhf_type": "gkd", "teacher_model": "t", "beta": beta}) > 0.2
