"""The off-policy share of distillation: which generations, and which rows of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines.demonstrations import Demonstrations, demonstrated_rows
from raytune_rl.protocol.data import Account, TokenSet

LENGTHS = np.arange(4, 11)
ROWS = TokenSet("answers", LENGTHS, LENGTHS - 3, Account((), {}, None, (), None, ()))
HALF = Demonstrations(ROWS, lmbda=0.5, count=3, seed=42, shuffle=True)


@pytest.mark.parametrize(("lmbda", "share"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_so_many_generations_are_the_datas(lmbda: float, share: float) -> None:
    taken = replace(HALF, lmbda=lmbda)
    assert np.mean([taken.due(g) for g in range(2000)]) == pytest.approx(share, abs=0.03)


def test_every_answer_comes_once_before_any_comes_again() -> None:
    due = [g for g in range(100) if HALF.due(g)][:7]
    rows = [t.data.row for g in due for t in HALF.of(g, version=g).batch]
    assert set(Counter(rows).values()) == {3}
    assert sorted(rows[:7]) == list(range(7))


def test_a_generation_is_the_same_whenever_it_is_asked_for() -> None:
    late = next(g for g in range(50, 100) if HALF.due(g))
    first, again = HALF.of(late, 4), HALF.of(late, 4)
    assert first.batch == again.batch
    one = first.batch[0]
    assert (one.length, one.episode.completion_tokens) == (
        LENGTHS[one.data.row],
        LENGTHS[one.data.row] - 3,
    )


def test_rows_are_read_as_sft_reads_them() -> None:
    config = RLHFConfig(
        rlhf_type="gkd", model="m", dataset="d", teacher_model="t", max_length=32, max_completion_length=16,
        system="Be brief.", columns={"q": "query"},
    )  # fmt: skip
    read = demonstrated_rows(config)
    assert (read.max_length, read.system, read.columns) == (48, "Be brief.", {"q": "query"})
    assert read.loss_scale == "last_round"


def test_an_experts_rows_are_read_so_too_and_nothing_is_held_out() -> None:
    config = RLHFConfig(
        model="m", dataset="d", val_dataset="v", reward_funcs="accuracy", loss_type="chord",
        chord_sft_dataset=["e", "f"], max_length=32, max_completion_length=16,
    )  # fmt: skip
    read = demonstrated_rows(config, config.chord_sft_dataset)
    assert (read.dataset, read.val_dataset, read.max_length) == (("e", "f"), (), 48)
