"""Faults are made in runs of the real stack, on the models and the cluster of tests/cluster."""

from __future__ import annotations

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from tests.cluster.conftest import Tiny, cluster, tiny
from tests.faults.runs import GRPO, Outcome, outcome, small

__all__ = ["cluster", "tiny"]


@pytest.fixture(scope="session")
def undisturbed_grpo(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    output = tmp_path_factory.mktemp("undisturbed_grpo")
    return outcome(online.run(RLHFConfig(**small(tiny, output, **GRPO))))
