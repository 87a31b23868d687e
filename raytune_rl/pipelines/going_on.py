"""A run that loses what no world outlives: a node with its object store, a rank without a snapshot. It begins
again in this process, from its newest checkpoint, on what is left of the cluster.

What was computed since the checkpoint is computed again, from the same seeds. Of a lost node a snapshot may
be left elsewhere: then it is that from which the run begins again (`rescue`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from raytune_rl.config.commands import TrainConfig
from raytune_rl.errors import CheckpointError, NodeLostError, PlacementError, SnapshotMissingError
from raytune_rl.groups.restarts import RestartBudget
from raytune_rl.pipelines.lifecycle import RunResult, note
from raytune_rl.protocol.faults import Fault
from raytune_rl.tracking.checkpoints import list_checkpoints, step_of
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.workers.leftovers import clear_new, named, places

C = TypeVar("C", bound=TrainConfig)


def going_on(
    config: C, attempt: Callable[[C], RunResult], sleep: Callable[[float], None] = time.sleep
) -> RunResult:
    """Runs, and runs again after such a loss while --max_restarts allows.

    Raises:
        RaytuneError: Whatever else went wrong; the loss itself where nothing is left to go on with.
    """
    before = {place: named(place) for place in places()}
    try:
        return _going_on(config, attempt, sleep)
    finally:
        for place, names in before.items():  # of workers that were ended, which cannot do so themselves
            clear_new(place, names)


def _going_on(config: C, attempt: Callable[[C], RunResult], sleep: Callable[[float], None]) -> RunResult:
    budget = RestartBudget(config.max_restarts)
    loss: Exception | None = None
    rescued: Path | None = None
    while True:
        try:
            result = attempt(config)
            if rescued is not None:
                for one in rescued.parent.glob("rescued-*"):
                    shutil.rmtree(one, ignore_errors=True)
            return result
        except (NodeLostError, SnapshotMissingError) as error:
            if not getattr(error, "survivable", True):
                raise
            loss = error
        except PlacementError as error:
            # The place of what was lost is not there again yet; a first start has no such excuse.
            if loss is None:
                raise
            loss = error
        reason = str(loss).partition("\n")[0]
        pause = budget.spend(Fault(time.time(), "run", "the run", "going on", reason), 1)
        rescued = getattr(loss, "rescued", None) or rescued
        origin = newest(config) if rescued is None else newer(rescued)
        config = cast(C, config.model_copy(update={"resume_from_checkpoint": origin}))
        where = "its newest checkpoint (or its start, without one)"
        if rescued is not None and Path(origin) == rescued:
            where = f"its newest snapshot, saved as {rescued.name}"
        note(f"{reason} The run begins again from {where}.")
        sleep(pause)


def newer(rescued: Path) -> str:
    """What was rescued of a run, or a checkpoint of it that is not older."""
    later = [one for one in list_checkpoints(RunDir(rescued.parent)) if step_of(one) >= step_of(rescued)]
    return str(later[-1] if later else rescued)


def newest(config: TrainConfig) -> str:
    """What to go on from: the newest checkpoint of the run that was named, else of the one in
    --output_dir."""
    asked = config.resume_from_checkpoint
    if asked in (None, "auto"):
        return "auto"
    path = Path(str(asked)).expanduser().absolute()
    try:
        run = RunDir.open(path) if (path / "trainer_state.json").is_file() else RunDir(path)
        return str(list_checkpoints(run)[-1])
    except (CheckpointError, IndexError):
        return str(asked)
