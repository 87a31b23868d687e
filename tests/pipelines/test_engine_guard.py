"""When log-probs of engine and policy are too far apart to be rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import EngineMismatchError
from raytune_rl.pipelines.engine_guard import GapWatch, gap_limit, root_mean_square, watched_limit

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "temperature": 1.0}


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(**{**GIVEN, **settings})


@pytest.mark.parametrize(
    ("settings", "on_gpu", "limit"),
    [
        ({}, False, 5e-3),
        ({}, True, 0.3),
        ({"torch_dtype": "float32"}, True, 5e-3),
        ({"quant_method": "bnb", "quant_bits": 4}, False, 1.0),
        ({"vllm_engine_kwargs": {"quantization": "fp8"}}, True, 1.0),
        ({"temperature": 0.1}, False, 5e-2),
        ({"temperature": 2.0}, False, 5e-3),
        ({"max_logp_gap": 0.02, "temperature": 0.1}, True, 0.02),
        ({"max_logp_gap": 0}, True, None),
    ],
)
def test_the_limit_follows_from_what_is_computed_with(
    settings: dict[str, Any], on_gpu: bool, limit: float | None
) -> None:
    assert gap_limit(config(**settings), on_gpu) == pytest.approx(limit)


def test_steps_are_not_judged_where_the_engine_samples_from_a_part_of_the_distribution() -> None:
    for cut in ({"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert watched_limit(config(**cut), on_gpu=False) is None
        assert watched_limit(config(**cut, max_logp_gap=2.0), on_gpu=False) == 2.0
        assert gap_limit(config(**cut), on_gpu=False) is not None, "the probe is drawn from all of it"


def test_root_mean_square_of_differences() -> None:
    differences = [np.array([0.3, -0.1]), np.array([0.2])]
    halves = np.array([(d**2).sum() / 2 for d in differences])
    expected = math.sqrt((0.09 + 0.01 + 0.04) / 3)
    assert root_mean_square(halves, [2, 1]) == pytest.approx(expected)


def test_a_gap_is_said_once_and_ends_the_run_when_it_stays() -> None:
    said: list[str] = []
    watch = GapWatch(0.3, said.append)
    for step, gap in enumerate([0.1, 0.5, 0.2, 0.4, 0.4, None, 0.31, math.nan], 1):
        watch.look(gap, step)
    assert [line.partition(":")[0] for line in said] == ["Note", "Note", "Note"]
    assert "step 2: log-probs of engine and policy differ by 0.5 nats" in said[0]
    with pytest.raises(
        EngineMismatchError, match=r"step 9: .*for 3 steps in a row.*--vllm_enable_lora false"
    ):
        watch.look(7.0, 9)


def test_without_a_limit_nothing_is_judged() -> None:
    watch = GapWatch(None, pytest.fail)
    for step in range(5):
        watch.look(100.0, step)
