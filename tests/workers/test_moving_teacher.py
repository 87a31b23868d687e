"""A teacher that follows the policy, saved between two moves and restored elsewhere, goes on to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.protocol.model import ModelSpec, ScoreSettings
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers import frozen
from raytune_rl.workers.teacher import TeacherWorker


def published(manifest: Any, timeout_s: float) -> Iterator[tuple[str, torch.Tensor]]:
    """A version of the policy: every weight is drawn by its number, as wide as the teacher's."""
    version, shapes = manifest
    generator = torch.Generator().manual_seed(version)
    for name, shape in shapes.items():
        yield name, torch.randn(shape, generator=generator)


def bits(worker: TeacherWorker) -> dict[str, Any]:
    _, kept = worker.weights()
    return {name: np.array(data) for name, data in kept.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_goes_on_from_a_checkpoint_as_if_there_had_been_none(
    dtype: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_rl.models.weights import export_tensors

    monkeypatch.setattr(frozen, "read", published)
    path = make_tiny_model(tmp_path / "model", tied=tied, hidden=64, layers=1)

    def start() -> TeacherWorker:
        return TeacherWorker(ModelSpec(str(path), dtype, None, "padded"), ScoreSettings(1.0, 1.0))

    whole = start()
    shapes = {name: tensor.shape for name, tensor in export_tensors(whole._model.scorer, "full")}
    before = bits(whole)
    for version in (1, 2):
        whole.mix((version, shapes), 0.3)  # type: ignore[arg-type]
    whole.save(str(tmp_path / "teacher"))
    there = bits(whole)
    for version in (3, 4):
        whole.mix((version, shapes), 0.3)  # type: ignore[arg-type]
    resumed = start()
    resumed.load(str(tmp_path / "teacher"))
    assert all((bits(resumed)[name] == there[name]).all() for name in there)
    for version in (3, 4):
        resumed.mix((version, shapes), 0.3)  # type: ignore[arg-type]
    ends, expected = bits(resumed), bits(whole)
    assert ends.keys() == expected.keys() == before.keys()
    for name, data in expected.items():
        assert (ends[name] == data).all(), name
        assert (before[name] != data).any(), name
