"""Tests of the product on a GPU. Without one they are skipped; RAYTUNE_RL_GPU_TESTS=cpu runs on a CPU, at a
tiny size, those that a CPU can run, so that their code is known to work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import Settings

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
ON_CPU = not ON_GPU and os.environ.get("RAYTUNE_RL_GPU_TESTS") == "cpu"
only_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU's memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.timeout(600))
        if not (ON_GPU or ON_CPU):
            item.add_marker(pytest.mark.skip(reason="no GPU here (RAYTUNE_RL_GPU_TESTS=cpu: on a CPU)"))


def settings(**more: Any) -> Settings:
    """A policy of the size that fits here."""
    small: dict[str, Any] = {} if ON_GPU else {"shape": "tiny", "tokens": 256, "row": 64}
    return Settings(**{**small, **more})


def alone(run: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own: DeepSpeed's world and a GPU's memory are one a process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, *args).result(timeout=550)
