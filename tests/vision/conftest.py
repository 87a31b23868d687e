"""A tiny Qwen2.5-VL and pictures of shapes, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from raytune_rl.tiny.shapes import ShapeFiles, write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("tiny_vl") / "model")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapeFiles:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data")
