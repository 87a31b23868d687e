"""How many engines a fleet should have, from what it was seen doing. Pure: time is told.

It grows where prompts have waited for long enough, at once to as many as would hold all that waits, judged by
what each holds now. It shrinks to the most that it needed within the idle time, so that the pauses in which a
policy trains cost no engine, and one that was just brought is not sent away. What is asked for and has no
place yet is given back first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Engines of a fleet: at least, and at most."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"{self.least} to {self.most} engines")

    @property
    def elastic(self) -> bool:
        """Whether the number may change."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least} to {self.most}" if self.elastic else str(self.least)


@dataclass(frozen=True)
class Patience:
    """Seconds.

    Attributes:
        waiting_s: That the first of the waiting prompts waits before the fleet grows.
        idle_s: In which an engine was not needed once before it is given back.
    """

    waiting_s: float = 30.0
    idle_s: float = 300.0


@dataclass(frozen=True)
class Demand:
    """What a fleet has to do at a moment.

    Attributes:
        busy: Engines that have work.
        running: Prompts that engines have.
        waiting: Prompts that no engine has room for.
        waiting_s: Seconds that the first of these has waited.
    """

    busy: int
    running: int
    waiting: int
    waiting_s: float

    @property
    def needed(self) -> int:
        """Engines that would have work if all that waits had a place: each with as much as the busy ones."""
        if not self.busy:
            return min(self.waiting, 1)
        return self.busy + -(-self.waiting * self.busy // max(self.running, 1))


class ScalingPolicy:
    """Says how many engines there should be. One that is lost stays wanted, and so is asked for again.

    Args:
        bounds: Of their number.
        patience: Before it changes.
    """

    def __init__(self, bounds: Bounds, patience: Patience) -> None:
        self._bounds, self._patience = bounds, patience
        self._target = bounds.least
        # What was needed, newest last; older and smaller entries can never be the largest again.
        self._peaks: deque[tuple[float, int]] = deque()
        self._since: float | None = None

    def target(self, demand: Demand, now: float) -> int:
        """Engines that there should be from now on. To be asked again and again, every few seconds."""
        needed = min(demand.needed, self._bounds.most)
        if self._since is None:
            self._since = now
        self._see(needed, now)
        if demand.waiting and demand.waiting_s >= self._patience.waiting_s:
            if needed > self._target:
                self._target, self._since = needed, now
        elif now - self._since >= self._patience.idle_s:
            self._target = min(self._target, max(self._peaks[0][1], self._bounds.least))
        return self._target

    def resize(self, engines: int, now: float) -> None:
        """So many are wanted now, within the bounds; from then on it goes on as before."""
        self._target = max(self._bounds.least, min(engines, self._bounds.most))
        self._since = now

    def joined(self, now: float) -> None:
        """An engine has just come: it, too, has the idle time before it is given back."""
        self._since = now

    def _see(self, needed: int, now: float) -> None:
        while self._peaks and self._peaks[-1][1] <= needed:
            self._peaks.pop()
        self._peaks.append((now, needed))
        while self._peaks[0][0] < now - self._patience.idle_s:
            self._peaks.popleft()
