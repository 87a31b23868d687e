"""Sampling ahead of the training."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from raytune_rl.config.base import Options, setting

_setting = partial(setting, "Asynchronous rollouts")


class AsyncOptions(Options):
    """Whether the engines go on while the policy trains, and how far they may be ahead of it."""

    async_generate: bool = _setting(
        False,
        "Sample while the policy trains, so that neither side waits for the longest completion: a step "
        "takes as long as the slower of the two, not as both. Completions are then of weights up to "
        "--max_staleness versions old. On GPUs that engines and policy share, bursts sample ahead instead.",
    )
    max_staleness: int = _setting(
        1,
        "--async_generate: most weight versions between sampling a token and training on it; nothing older "
        "is ever trained on, and nothing is dropped for its age. 0: the synchronous loop.",
        ge=0,
    )
    rollout_in_flight: Literal["keep", "recompute", "abort", "drain"] = _setting(
        "keep",
        "--async_generate: what becomes of half-written completions when new weights arrive. keep: they go "
        "on with the key-value cache of the old weights; recompute: they go on, and the cache is computed "
        "anew; abort: they are thrown away and begun again; drain: they are finished first. A token's "
        "log-prob is always that with which it was sampled, so the loss corrects for all four alike, and "
        "keep costs least.",
    )


def staleness_bound(config: Any) -> int:
    """Most weight versions between sampling and training; 0 in the synchronous loop."""
    return config.max_staleness if config.async_generate else 0
