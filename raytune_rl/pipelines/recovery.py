"""What becomes of losses in a run: said at once, counted, kept as lines, and how many there may be."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raytune_rl.config.commands import TrainConfig
from raytune_rl.groups.restarts import RecoveryRules, RestartBudget
from raytune_rl.protocol.faults import Fault
from raytune_rl.tracking import faults
from raytune_rl.tracking.unwritten import forgiven

STORE_SHARE = 1 / 3
"""Of the object store that the snapshots of a run may fill, the new ones and the old ones together."""
_LOST = re.compile(r"(?P<who>[\w ]+\[\d+\])[^']*'(?P<phase>[^']*)'")


class FaultLog:
    """All losses of a run.

    Args:
        path: faults.jsonl.
        say: Tells the user a sentence.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self.say, self._clock = path, say, clock
        self.lost: Counter[str] = Counter()
        self._recovered_s = 0.0
        self._repeated = 0

    def replaced(self, group: str, message: str) -> None:
        """A worker without a state of its own was lost, and another takes its work."""
        self.say(f"Note: {message}")
        named = _LOST.search(message)
        who, phase = (named["who"], named["phase"]) if named else (group, "")
        self.recovered(Fault(self._clock(), group, who, phase, message))

    def recovered(self, fault: Fault) -> None:
        """A loss is over, or seen to."""
        self.lost[fault.group] += 1
        self._recovered_s += fault.recovered_s or 0.0
        steps = re.match(r"\d+", fault.repeated)
        self._repeated += int(steps[0]) if steps else 0
        with forgiven(self._path):
            faults.append(self._path, fault)

    def metrics(self) -> dict[str, float]:
        """Of this process's run so far; none where nothing was lost."""
        if not self.lost:
            return {}
        return {
            "faults/lost_workers": float(self.lost.total()),
            "faults/recovery_seconds": self._recovered_s,
            "faults/repeated_steps": float(self._repeated),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table of all losses of the run, those before a resume included."""
        return faults.table(faults.read(self._path))


def rules_of(
    config: TrainConfig,
    log: FaultLog,
    store_bytes: int,
    worlds: int,
    copy: Callable[[Sequence[Any], str], None],
) -> RecoveryRules:
    """How the run treats the loss of a rank.

    Args:
        config: Of the run.
        log: Told of each loss.
        store_bytes: Object store of the cluster.
        worlds: That keep snapshots: policy, and critic.
        copy: Makes a second copy of snapshots, for when a node is lost.
    """
    return RecoveryRules(
        RestartBudget(config.max_restarts),
        config.hang_timeout,
        config.snapshot_steps,
        store_bytes * STORE_SHARE / (2 * worlds),
        log.recovered,
        log.say,
        copy,
    )


def in_words(config: TrainConfig) -> tuple[str, str]:
    """A row of the plan."""
    every = config.snapshot_steps
    if not config.max_restarts:
        return "a lost rank", "ends the run (--max_restarts 0)"
    if every == 0:
        return "a lost rank", "begins the run again from its newest checkpoint (--snapshot_steps 0)"
    often = f"every {every} step(s)" if every else "each step where it costs under 5%"
    return (
        "a lost rank",
        f"is started anew from a snapshot ({often}; 12 bytes a trained parameter, in the object store), up "
        f"to {config.max_restarts} times",
    )
