"""Which checkpoint is the last and which is the best, carried from save to save in trainer_state.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_rl.tracking.run_dir import RunDir


@dataclass(frozen=True)
class CheckpointRecord:
    """Paths of the last and the best checkpoint and the best one's metric, named as in ms-swift's logs."""

    last_model_checkpoint: str | None = None
    best_model_checkpoint: str | None = None
    best_metric: float | None = None

    def after(self, path: Path, metric: float | None, greater_is_better: bool) -> CheckpointRecord:
        """The record once `path` is saved. A missing or NaN metric is never best; a tie keeps the first."""
        best, best_metric = self.best_model_checkpoint, self.best_metric
        if metric is not None and math.isfinite(metric):
            better = best_metric is None or (
                metric > best_metric if greater_is_better else metric < best_metric
            )
            if better:
                best, best_metric = str(path), metric
        return CheckpointRecord(str(path), best, best_metric)

    @property
    def best(self) -> Path | None:
        """The path to pass as `keep` to `prune`."""
        return Path(self.best_model_checkpoint) if self.best_model_checkpoint else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], run_dir: RunDir) -> CheckpointRecord:
        """From a checkpoint's trainer_state.json, also when the run directory has moved since.

        A best checkpoint that is no longer there is forgotten together with its metric, so that the next good
        one can take its place.
        """
        last, best = (
            _here(state.get(key), run_dir) for key in ("last_model_checkpoint", "best_model_checkpoint")
        )
        return cls(last, best, state.get("best_metric") if best else None)


def _here(path: str | None, run_dir: RunDir) -> str | None:
    if not path:
        return None
    moved = run_dir.path / Path(path).name
    return str(moved) if moved.is_dir() else None
