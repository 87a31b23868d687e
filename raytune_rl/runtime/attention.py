"""Whether whoever listens to others was there to hear them: what was not heard meanwhile is no fault of
theirs.
"""

from __future__ import annotations


class Attention:
    """Of one listener.

    Args:
        every_s: Seconds from one look to the next, at most.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._looked: float | None = None

    def missed(self, now: float) -> float:
        """Looks. Seconds by which that is late, as of a process that was stopped or swapped out; 0 for none.

        Args:
            now: Seconds of any clock.
        """
        late = 0.0 if self._looked is None else now - self._looked - self._every_s
        self._looked = now
        return max(0.0, late)
