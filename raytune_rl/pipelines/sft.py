"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_rl.config import SFTConfig
from raytune_rl.pipelines import objective, offline
from raytune_rl.pipelines.lifecycle import RunResult


def run(config: SFTConfig, notices: Sequence[str] = ()) -> RunResult:
    """Fine-tunes a model on a Ray cluster, joined or started here; see `offline.run`."""
    return offline.run(config, objective.supervised(config), notices)
