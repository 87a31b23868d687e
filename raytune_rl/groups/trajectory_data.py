"""What trajectories refer to, taken out of the object store and put back: for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from raytune_rl.groups.fleet import read_dialogues, read_texts
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime.wait import Pending, fetch


@dataclass(frozen=True)
class TrajectoryData:
    """The content of trajectories, in their order.

    Attributes:
        columns: Tokens, loss mask, log-probs and versions, as `workers.rollout` returns them.
        texts: The completions.
        dialogues: The messages of their turns; empty where the model has one turn only.
    """

    columns: Columns
    texts: list[str]
    dialogues: list[dict[str, Any]]


class TrajectoryStore:
    """Reads and writes the content of trajectories in the object store.

    Args:
        timeout_s: Deadline of a read, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def read(self, trajectories: Sequence[Trajectory]) -> TrajectoryData:
        """Takes the content of a few trajectories, such as a group's, into this process."""
        refs = list(dict.fromkeys(t.data.ref for t in trajectories))
        pending = [Pending(ref, "the object store", "reading completions", self._timeout_s) for ref in refs]
        found = dict(zip(refs, map(fetch, pending), strict=True))
        columns: Columns = {}
        for name, column in found[refs[0]].items():
            rows = [np.asarray(found[t.data.ref][name][t.data.row]) for t in trajectories]
            columns[name] = Ragged.from_rows(rows, column.values.dtype)
        return TrajectoryData(
            columns,
            read_texts(trajectories, self._timeout_s),
            read_dialogues(trajectories, self._timeout_s),
        )

    def write(
        self, data: TrajectoryData, trajectories: Sequence[Trajectory], prompts: PromptSet
    ) -> list[Trajectory]:
        """Puts content into the object store; gives the trajectories with pointers to it."""
        columns, texts = ray.put(data.columns), ray.put(data.texts)
        dialogues = ray.put(data.dialogues) if data.dialogues else None
        return [
            replace(
                trajectory,
                data=RowPointer(columns, row),
                text=RowPointer(texts, row),
                dialogue=None if dialogues is None else RowPointer(dialogues, row),
                media=prompts.media(trajectory.prompt),
            )
            for row, trajectory in enumerate(trajectories)
        ]
