"""The real stack on tiny models: one Ray cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from raytune_rl.runtime.fork_server import serving
from raytune_rl.tiny.arithmetic import ArithmeticFiles, write_dataset
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.imports import SAMPLING, TRAINING
from tests.local_ray import start_ray

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@dataclass(frozen=True)
class Tiny:
    """A tiny model in both kinds of head, and arithmetic data."""

    tied: Path
    untied: Path
    data: ArithmeticFiles


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    return Tiny(
        make_tiny_model(root / "tied", tied=True, hidden=128, layers=2),
        make_tiny_model(root / "untied", tied=False, hidden=128, layers=2),
        write_dataset(root / "data", train=64, held_out=8, sft=64),
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray on this machine."""
    if ray.is_initialized():  # tests/faults has this fixture too, and pytest makes it anew there
        yield
        return
    with serving([TRAINING, SAMPLING]) as python:
        start_ray(runtime_env={"py_executable": python})
        yield
        ray.shutdown()
