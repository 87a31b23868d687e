"""Learning from preferences in the data: DPO, KTO, ORPO, CPO, SimPO, reward models."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_rl.config import PreferenceConfig
from raytune_rl.pipelines import objective, offline
from raytune_rl.pipelines.lifecycle import RunResult


def run(config: PreferenceConfig, notices: Sequence[str] = ()) -> RunResult:
    """Trains a model on a Ray cluster, joined or started here; see `offline.run`."""
    return offline.run(config, objective.preference(config), notices)
