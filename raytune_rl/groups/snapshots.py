"""Snapshots of a world in the object store, and the steps made since: together they are its present state.

A snapshot is what the ranks return, so the driver owns it and it outlives them. It is taken behind the step's
own work, while the ranks would wait for the next generation, and takes the place of the one before it only
when every rank's part is whole. Between two snapshots the steps are kept as what was asked for: the batches
are references, and done again they give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.runtime.wait import Pending

SHARE = 0.05
"""Of the time that snapshots may take where nobody says how often they are taken."""
COPIED_PER_S = 1e9
"""Bytes that a rank is taken to copy into the store in a second: as fresh shared memory was measured (see
benchmarks/README.md), rather less than a server does."""


@dataclass(frozen=True)
class Snapshot:
    """A world's state after some steps.

    Attributes:
        steps: Steps done since the world was started or restored.
        parts: What each rank's bytes are.
        refs: The bytes.
    """

    steps: int
    parts: tuple[SnapshotPart, ...]
    refs: tuple[object, ...]

    @property
    def nbytes(self) -> int:
        """Of all ranks."""
        return sum(part.nbytes for part in self.parts)


@dataclass
class History:
    """From what a world can be made again.

    Attributes:
        checkpoint: It was restored from this one; None: it began as its model's files.
        snapshot: The newest whole one; None: none since the checkpoint.
        steps: Steps done so far.
        since: The steps after the snapshot (or the checkpoint), in order.
    """

    checkpoint: Path | None = None
    snapshot: Snapshot | None = None
    steps: int = 0
    since: list[tuple[TrainBatch, int]] = field(default_factory=list)

    def stepped(self, batch: TrainBatch, step: int) -> None:
        """A step is done."""
        self.steps += 1
        self.since.append((batch, step))

    def restored(self, checkpoint: Path) -> None:
        """The world is what a checkpoint says."""
        self.checkpoint, self.snapshot, self.steps, self.since = checkpoint, None, 0, []

    def forget(self) -> None:
        """Gives back the room that it takes: from here on a lost world is not made again."""
        self.snapshot, self.since = None, []

    def take(self, snapshot: Snapshot) -> None:
        """A snapshot is whole: what lies before it is dropped."""
        self.since = self.since[len(self.since) - (self.steps - snapshot.steps) :]
        self.snapshot = snapshot


class Snapshots:
    """Takes them when they are due.

    Args:
        history: Of the world; here is where snapshots go.
        ask: Asks every rank for its part: calls with two results.
        ready: The first results, once all have answered; None while one is owed, and none at all where it
            could not be kept.
        every: Steps from one to the next; 0: none; None: as often as `SHARE` allows.
        allowed: Whether a snapshot of so many bytes may stay, where `every` is None.
    """

    def __init__(
        self,
        history: History,
        ask: Callable[[], list[Pending]],
        ready: Callable[[Sequence[Pending]], list[SnapshotPart] | None],
        every: int | None,
        allowed: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._history, self._ask, self._ready = history, ask, ready
        self._every, self._allowed = every, allowed
        self._pending: tuple[int, list[Pending]] | None = None
        self._seconds, self._steps = 0.0, 0
        self.on = every != 0

    @property
    def interval(self) -> int:
        """Steps from one to the next, as things are."""
        newest = self._history.snapshot
        if newest is None and self._history.checkpoint is not None:
            return 1  # that checkpoint may be removed when there are newer ones
        if self._every is not None:
            return self._every
        if newest is None or not self._seconds:
            return 1
        cost_s = max(part.seconds + part.nbytes / COPIED_PER_S for part in newest.parts)
        return max(1, math.ceil(cost_s * self._steps / (SHARE * self._seconds)))

    def stepped(self, seconds: float) -> None:
        """So long after the step before it, or after its own beginning, a step was done."""
        self._seconds += seconds
        self._steps += 1

    def begin_if_due(self) -> None:
        """Asks for a snapshot of the present state, unless it is too soon. Returns at once."""
        self.settle()
        steps = self._history.steps
        newest = self._history.snapshot
        done = 0 if newest is None else newest.steps
        if not self.on or self._pending is not None or steps - done < self.interval:
            return
        self._pending = steps, self._ask()

    def settle(self) -> None:
        """Takes what was asked for, if it is whole by now."""
        if self._pending is None:
            return
        steps, calls = self._pending
        parts = self._ready(calls)
        if parts is None:
            return
        self._pending = None
        snapshot = Snapshot(steps, tuple(parts), tuple(call.ref[1] for call in calls))
        if self._every is None and not (parts and self._allowed(snapshot.nbytes)):
            self.on = False
            self._history.forget()
        elif parts:
            self._history.take(snapshot)

    def drop(self) -> None:
        """The ranks are gone: what they still owe never comes."""
        self._pending = None
