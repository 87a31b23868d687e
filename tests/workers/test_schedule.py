"""The learning rate of every step against Transformers' own scheduler on an AdamW of several groups."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from raytune_rl.config import SFTConfig
from raytune_rl.config.training import SCHEDULE_KWARGS, Scheduler
from raytune_rl.errors import ConfigError
from raytune_rl.protocol.train import OptimizerSpec
from raytune_rl.workers.engine import learning_rate

STEPS = 100
GIVEN: dict[str, list[dict[str, Any]]] = {
    "cosine": [{"num_cycles": 1.5}],
    "polynomial": [{"lr_end": 1e-8}, {"power": 2.0, "lr_end": 0.0}],
    "cosine_with_min_lr": [{"min_lr": 2e-7}, {"min_lr_rate": 0.3, "num_cycles": 1.5}],
    "inverse_sqrt": [{"timescale": 7}],
}


def spec(kind: str, rate: float, warmup: int, **given: Any) -> OptimizerSpec:
    return OptimizerSpec(rate, kind, warmup, STEPS, (0.9, 0.95), 1e-8, 0.1, 1.0, {}, given)


def test_every_argument_is_tried() -> None:
    assert {kind: {n for one in several for n in one} for kind, several in GIVEN.items()} == {
        kind: set(names) for kind, names in SCHEDULE_KWARGS.items()
    }


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("rate", [1e-6, 3e-4])
@pytest.mark.parametrize(
    ("kind", "given"), [(k, g) for k in get_args(Scheduler) for g in [{}, *GIVEN.get(k, [])]]
)
def test_every_step_is_transformers_own(kind: str, given: dict[str, Any], rate: float, warmup: int) -> None:
    mine = learning_rate(spec(kind, rate, warmup, **given))
    groups = [{"params": [torch.zeros(2, 2)], "weight_decay": 0.1}, {"params": [torch.zeros(2)]}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    theirs = {"min_lr_rate": 0.1} if kind == "cosine_with_min_lr" and not given else given
    scheduler = get_scheduler(kind, optimizer, warmup, STEPS, theirs)
    for step in range(STEPS):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([mine(step)] * 2, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_polynomials_end_is_no_share_of_the_peak() -> None:
    assert learning_rate(spec("polynomial", 1e-6, 0))(90) == pytest.approx(1.9e-7)


def test_what_does_not_fit_is_refused() -> None:
    def config(**given: Any) -> SFTConfig:
        return SFTConfig(model="m", dataset=("d.jsonl",), **given)

    with pytest.raises(ConfigError, match="lr_end: --lr_scheduler_type cosine takes num_cycles"):
        config(lr_scheduler_kwargs={"lr_end": 1e-8})
    with pytest.raises(ConfigError, match="constant takes none"):
        config(lr_scheduler_type="constant", lr_scheduler_kwargs={"power": 2.0})
    with pytest.raises(ConfigError, match="ends at 1e-07, which is not below --learning_rate 1e-08"):
        config(lr_scheduler_type="polynomial", learning_rate=1e-8)
    with pytest.raises(ConfigError, match="--lr_scheduler_type polynomial: lr_end"):
        learning_rate(spec("polynomial", 1e-8, 0))
