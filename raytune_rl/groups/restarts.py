"""How often what is lost may be started anew, and how long to wait before. Failures of data are not counted
here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.errors import RestartsUsedUpError
from raytune_rl.protocol.faults import Fault

ATTEMPTS = 3
"""How often one and the same work may lose its workers: what does so each time is likely to be its doing."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before the second restart in a row, doubled with each further one; the first comes at once."""
QUIET_S = 300.0
"""Seconds without a loss after which the next is the first again."""


@dataclass
class RestartBudget:
    """Counts restarts of a run's worlds.

    Attributes:
        most: In the whole run; 0: a loss ends it.
        clock: Seconds.
        losses: All so far.
    """

    most: int
    clock: Callable[[], float] = time.monotonic
    losses: list[Fault] = field(default_factory=list)
    _at: list[float] = field(default_factory=list)

    def spend(self, fault: Fault, attempt: int) -> float:
        """Takes one restart.

        Args:
            fault: What was lost.
            attempt: How often it was lost at this very work, from 1.

        Returns:
            Seconds to wait before the start.

        Raises:
            RestartsUsedUpError: There is none left, or this work has lost its workers too often.
        """
        self.losses.append(fault)
        now = self.clock()
        row = 0
        for earlier, later in zip(reversed(self._at), [now, *reversed(self._at)], strict=False):
            if later - earlier > QUIET_S:
                break
            row += 1
        self._at.append(now)
        if len(self.losses) > self.most:
            raise RestartsUsedUpError(self._ended(f"all {self.most} restarts (--max_restarts) are used up"))
        if attempt > ATTEMPTS:
            raise RestartsUsedUpError(
                self._ended(f"it was lost {attempt} times at the same work, '{fault.phase}'")
            )
        return 0.0 if row == 0 else min(FIRST_PAUSE_S * 2.0 ** (row - 1), LONGEST_PAUSE_S)

    def _ended(self, why: str) -> str:
        latest = self.losses[-1]
        lines = [f"{latest.loss.rstrip('.')}; it is not started anew, as {why}."]
        lines += [
            f"  {time.strftime('%H:%M:%S', time.gmtime(one.when))} UTC: {one.who} at '{one.phase}'"
            for one in self.losses[-10:]
        ]
        lines.append(
            "The same command with --resume_from_checkpoint auto goes on from the newest checkpoint; a "
            "higher --max_restarts allows more."
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class RecoveryRules:
    """How a run treats the loss of a rank.

    Attributes:
        budget: Of restarts, one for all worlds of a run.
        hang_timeout_s: Seconds without a sign of life that make a hang; 0: nobody looks.
        snapshot_steps: Optimizer steps from one snapshot to the next; 0: none is taken, and a lost rank ends
            the run; None: each step, or as often as its cost allows.
        snapshot_bytes: Most bytes that a world's snapshot may take while none is asked for by number.
        tell: Told each fault when it is over.
        say: Tells the user a sentence.
        copy: Makes a second copy of a world's newest snapshot, here, as soon as it is there: given its
            objects and the world's name.
    """

    budget: RestartBudget
    hang_timeout_s: float
    snapshot_steps: int | None
    snapshot_bytes: float
    tell: Callable[[Fault], None]
    say: Callable[[str], None]
    copy: Callable[[Sequence[Any], str], None]
