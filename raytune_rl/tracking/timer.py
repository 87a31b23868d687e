"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step: all of it, and by phase in the order of first entry; phases add up to no more."""

    total: float
    phases: Mapping[str, float]

    @property
    def other(self) -> float:
        """Seconds outside every phase."""
        return self.total - sum(self.phases.values())

    def metrics(self) -> dict[str, float]:
        """Under ms-swift's names: `step_time` and `profiling/<phase>`, in seconds."""
        named = {f"profiling/{name}": seconds for name, seconds in self.phases.items()}
        return {"step_time": self.total, **named, "profiling/other": self.other}


class StepTimer:
    """`with timer.phase("generate"): ...`, then `timer.finish()` at the end of the step.

    A phase inside another stops the outer one's clock, so each second counts once. For one thread.

    Args:
        clock: Seconds, monotonic.
        on_phase: Told the phase's name on entry and on return to it, None outside; for a live display.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_phase: Callable[[str | None], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._stack: list[str] = []
        self._phases: dict[str, float] = {}
        self._start = self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside towards `name`, also when the body raises."""
        self._account()
        self._phases.setdefault(name, 0.0)
        self._stack.append(name)
        self._tell()
        try:
            yield
        finally:
            self._account()
            self._stack.pop()
            self._tell()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside belongs to no step: evaluations and checkpoints."""
        self._account()
        began = self._clock()
        try:
            yield
        finally:
            gap = self._clock() - began
            self._start += gap
            self._mark += gap

    def so_far(self) -> float:
        """Seconds since the last `finish` (or the start)."""
        return self._clock() - self._start

    def finish(self) -> StepTimes:
        """The times since the last `finish` (or the start), and a new step begins.

        Raises:
            RuntimeError: A phase is still open.
        """
        if self._stack:
            raise RuntimeError(f"the step ended inside the phase {self._stack[-1]!r}")
        now = self._clock()
        times = StepTimes(now - self._start, self._phases)
        self._phases = {}
        self._start = self._mark = now
        return times

    def _account(self) -> None:
        now = self._clock()
        if self._stack:
            self._phases[self._stack[-1]] += now - self._mark
        self._mark = now

    def _tell(self) -> None:
        if self._on_phase is not None:
            self._on_phase(self._stack[-1] if self._stack else None)
