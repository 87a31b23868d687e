"""Parts that DeepSpeed cannot move are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(model="m", dataset="d", reward_funcs="accuracy", **settings)


def test_what_can_be_moved() -> None:
    config(offload_model=True, offload_optimizer=True)
    config(offload_model=True, deepspeed="zero3")
    config(offload_model=True, offload_optimizer=True, deepspeed="zero2_offload")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_model": True, "deepspeed": "zero0"}, "--offload_model true needs ZeRO"),
        ({"offload_optimizer": True, "deepspeed": "zero3"}, "--deepspeed zero3_offload"),
        ({"offload_model": True, "deepspeed": "zero3_offload"}, "on the CPU already"),
    ],
)
def test_what_cannot(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
