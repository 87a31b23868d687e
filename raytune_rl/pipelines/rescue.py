"""What is saved of a run whose node is lost: the newest snapshots of all that learns, of which this node has
copies, with the run's state as it was then. The run begins again from there, and repeats no step that the
snapshots hold.

It is like a checkpoint without a model that anybody could load, and so has another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from raytune_rl.errors import NodeLostError, RaytuneError
from raytune_rl.pipelines.lifecycle import Run
from raytune_rl.runtime.health import health
from raytune_rl.tracking.checkpoints import CheckpointWriter


class KeepsSnapshots(Protocol):
    """One model or several that learn."""

    def snapshot_steps(self) -> int | None:
        """Steps from where the run began to the newest snapshot; None: there is none."""
        ...

    def write_snapshot(self, directory: Path, steps: int) -> None:
        """Writes it as a checkpoint's optimizer state."""
        ...


class Rescue:
    """Remembers the states of a run that snapshots may be of, and saves one of them when a node is lost.

    Args:
        run: It.
        learners: What it trains.
    """

    def __init__(self, run: Run, learners: KeepsSnapshots) -> None:
        self._run, self._learners = run, learners
        self._began = run.step
        self._states: dict[int, dict[str, Any]] = {}

    def mark(self, state: Mapping[str, Any]) -> None:
        """The run could be saved now, with this state."""
        newest = self._learners.snapshot_steps() or 0
        kept = {steps: before for steps, before in self._states.items() if steps >= newest}
        self._states = {**kept, self._run.step - self._began: self._run.whole_state(state)}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """If a node is lost in the block and the run can go on on others, what there is is saved."""
        try:
            yield
        except BaseException as error:
            found = health()
            if found.lost is not None and found.survivable and self._states:
                found.end()  # nobody waits with a watch in the hand any more
                found.rescued = self._saved()
                if isinstance(error, NodeLostError):
                    error.rescued = found.rescued
            raise

    def _saved(self) -> Path | None:
        steps = self._learners.snapshot_steps()
        state = None if steps is None else self._states.get(steps)
        if steps is None or state is None:
            return None
        writer = CheckpointWriter(self._run.dir, self._began + steps, state, rescues=True)
        try:
            with writer as path:
                self._learners.write_snapshot(path, steps)
        except RaytuneError as error:
            self._run.say(f"Note: the newest snapshot could not be saved: {error}")
            return None
        return writer.final
