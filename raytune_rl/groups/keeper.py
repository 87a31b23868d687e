"""A world that outlives its ranks: who is lost, or hangs, takes all of them down; they start anew in their
places, become what they were, and the interrupted work is done again.

Everything that ranks are asked for is a function of the world's state and of what is asked, and optimizer
steps alone change that state. So a newest snapshot and the steps since (`snapshots.History`) give the same
bits as if nothing had been lost, whatever the work was that was interrupted: a step, log-probs, a
publication, a checkpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_rl.errors import (
    DeadlineExceededError,
    RaytuneError,
    SnapshotMissingError,
    WorkerDiedError,
    WorkerFailedError,
    WorkerHungError,
)
from raytune_rl.groups.restarts import RecoveryRules
from raytune_rl.groups.snapshots import History, Snapshot, Snapshots
from raytune_rl.protocol.faults import Fault
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.runtime.group import WorkerGroup, progress_of
from raytune_rl.runtime.probe import ProgressProbe
from raytune_rl.runtime.wait import Pending, check_kept, fetch_all

T = TypeVar("T")
LOSSES = (WorkerDiedError, WorkerFailedError, DeadlineExceededError)
"""As what a lost rank shows itself: a peer's collective fails, too, and often sooner."""
NOTICED_WITHIN_S = 5.0
"""Ray knows of a dead process after so many seconds at the latest, its peers at once."""
WITHOUT = "None is kept, and the loss of a rank begins the run again from its newest checkpoint."
_BROKEN = re.compile(r"connection|peer|socket|gloo|nccl|broken pipe|store", re.IGNORECASE)


class Keeper:
    """Keeps the ranks of one world.

    Args:
        group: They.
        rules: How losses are treated.
        join: Makes started ranks a world that has loaded its model.
        step: One optimizer step, waited for.
        start_timeout_s: Deadline for becoming what they were.
    """

    def __init__(
        self,
        group: WorkerGroup,
        rules: RecoveryRules,
        join: Callable[[], Any],
        step: Callable[[TrainBatch, int], Any],
        start_timeout_s: float,
    ) -> None:
        self._group, self._rules, self._join, self._step = group, rules, join, step
        self._start_timeout_s = start_timeout_s
        self._stepped: float | None = None
        self._unkept = ""  # why the last snapshot could not be kept
        self.history = History()
        self.snapshots = Snapshots(
            self.history, self._ask, self._ready, rules.snapshot_steps, self._is_small_enough
        )
        self.probe = ProgressProbe(
            len(group), group.ask_progress, progress_of, group.who, rules.hang_timeout_s
        )
        group.watch = self.probe.look

    def run(self, what: str, work: Callable[[], T]) -> T:
        """Does work of the ranks, and does it again where a rank is lost meanwhile.

        Raises:
            RestartsUsedUpError: Too often.
            RaytuneError: The work's own failures, as they are.
        """
        attempt = 0
        while True:
            try:
                return work()
            except LOSSES as error:
                attempt += 1
                self._recover(what, self._blamed(what, error), attempt)

    def stepped(self, batch: TrainBatch, step: int, began: float) -> None:
        """An optimizer step is done that began at this time of the monotonic clock."""
        now = time.monotonic()
        self.probe.started()
        self.history.stepped(batch, step)
        self.snapshots.stepped(now - (began if self._stepped is None else self._stepped))
        self._stepped = now
        if not self.snapshots.on:
            self.history.since.clear()

    def restored(self, checkpoint: Path) -> None:
        """The world is what a checkpoint says."""
        self.snapshots.drop()
        self.history.restored(checkpoint)

    def newest(self) -> Snapshot | None:
        """The newest snapshot that is whole by now."""
        with suppress(RaytuneError):  # of what a lost rank owes none will be
            self.snapshots.settle()
        return self.history.snapshot

    def write(self, directory: Path, steps: int) -> None:
        """Writes the snapshot after so many steps as the optimizer state of a checkpoint. The ranks are not
        needed: it is done here, from the copies of what lay with them.

        Raises:
            SnapshotMissingError: There is none.
            RaytuneError: A part is lost, or the file system refused.
        """
        snapshot = self.history.snapshot
        if snapshot is None or snapshot.steps != steps:
            raise SnapshotMissingError(f"there is no snapshot of the {self._group.name} after {steps} steps")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(_write).options(scheduling_strategy=here)
        what, who = "writing the snapshot", f"a copy of the {self._group.name}'s snapshot"
        parts = zip(snapshot.parts, snapshot.refs, strict=True)
        fetch_all(
            [
                Pending(task.remote(part, ref, str(directory), rank), who, what, self._start_timeout_s)
                for rank, (part, ref) in enumerate(parts)
            ]
        )

    # -- losses
    # ----------------------------------------------------------------------------------------------

    def _blamed(self, what: str, error: Exception) -> Fault:
        """Who was lost, as a fault; an error that has another cause is raised as it is."""
        reason = str(error).partition("\n")[0].strip(" .")
        if isinstance(error, (WorkerHungError, DeadlineExceededError)):
            who = re.match(rf"{re.escape(self._group.name)}\[\d+\](?= (?:gives|did))", reason)
            return self._fault(who[0] if who else self._group.name, what, f"{reason}, during '{what}'.")
        dead = self._dead(patient=bool(_BROKEN.search(str(error))))
        if not dead:
            raise error
        names = ", ".join(self._group.who(rank) for rank in dead)
        known = isinstance(error, WorkerDiedError) and reason.startswith(names)
        return self._fault(names, what, f"{reason}." if known else f"{names} died during '{what}'.")

    def _fault(self, who: str, what: str, loss: str) -> Fault:
        return Fault(time.time(), self._group.name, who, what, loss)

    def _dead(self, patient: bool) -> list[int]:
        """Ranks whose process has ended. Ray may come to know of it after their peers."""
        deadline = time.monotonic() + (NOTICED_WITHIN_S if patient else 1.0)
        while True:
            asked = [self._group.ask_progress(rank) for rank in range(len(self._group))]
            answers, _ = ray.wait(asked, num_returns=len(asked), timeout=1.0)
            dead = [rank for rank, ref in enumerate(asked) if ref in answers and _failed(ref)]
            if dead or time.monotonic() > deadline:
                return dead
            time.sleep(0.1)

    def _recover(self, what: str, fault: Fault, attempt: int) -> None:
        rules, history = self._rules, self.history
        began = time.monotonic()
        self.snapshots.settle()
        if not self.snapshots.on and history.steps:
            raise SnapshotMissingError(
                f"{fault.loss} It is not started anew, as there is no snapshot of it (--snapshot_steps). The "
                "same command with --resume_from_checkpoint auto goes on from the newest checkpoint."
            )
        self.snapshots.drop()
        while True:
            pause = rules.budget.spend(fault, attempt)
            remedy = f"All {len(self._group)} {self._group.name} rank(s) start anew{self._from()}"
            rules.say(f"Note: {fault.loss} {remedy}, and the work is done again.")
            time.sleep(pause)
            try:
                self._start_anew()
            except LOSSES as error:
                attempt += 1
                fault = self._blamed(f"starting anew after '{what}'", error)
                continue
            break
        repeated = len(history.since)
        rules.tell(
            replace(
                fault,
                remedy=f"{remedy}.",
                recovered_s=time.monotonic() - began,
                repeated=f"{repeated} optimizer step{'s' * (repeated != 1)}" if repeated else "",
            )
        )

    def _from(self) -> str:
        history = self.history
        if history.snapshot is not None:
            return " from the newest snapshot"
        return f" from {history.checkpoint}" if history.checkpoint is not None else ""

    def _start_anew(self) -> None:
        group, history = self._group, self.history
        group.restart()
        self.probe.forget()
        self._join()
        self.probe.started()
        if history.snapshot is not None:
            what = "going back to the snapshot"
            parts, refs = history.snapshot.parts, history.snapshot.refs
            fetch_all(
                [
                    group.submit(rank, "put_back", part, ref, what=what, timeout_s=self._start_timeout_s)
                    for rank, (part, ref) in enumerate(zip(parts, refs, strict=True))
                ]
            )
        elif history.checkpoint is not None:
            where = str(history.checkpoint / "optimizer")
            group.call("load_checkpoint", where, what="restoring the checkpoint")
        for batch, step in history.since:
            self._step(batch, step)

    # -- snapshots
    # -------------------------------------------------------------------------------------------

    def _ask(self) -> list[Pending]:
        group = self._group
        ranks = range(len(group))
        calls = [group.submit(rank, "snapshot", what="taking a snapshot", returns=2) for rank in ranks]
        self._rules.copy([call.ref[1] for call in calls], group.name)
        return calls

    def _ready(self, calls: Sequence[Pending]) -> list[SnapshotPart] | None:
        """Of a rank that died meanwhile there is none, ever: the work that finds it dead sees to that."""
        firsts = [call.ref[0] for call in calls]
        done, _ = ray.wait(firsts, num_returns=len(firsts), timeout=0, fetch_local=False)
        if len(done) < len(firsts):
            return None
        try:
            parts = fetch_all([replace(call, ref=ref) for call, ref in zip(calls, firsts, strict=True)])
            check_kept(calls)
        except WorkerDiedError:
            return None
        except RaytuneError as error:  # a full object store
            reason = str(error).partition("\n")[0]
            if reason != self._unkept:
                then = WITHOUT if self._rules.snapshot_steps is None else "The next one is tried."
                self._rules.say(
                    f"Note: a snapshot of the {self._group.name} could not be kept: {reason} {then}"
                )
            self._unkept = reason
            return []
        self._unkept = ""
        return parts

    def _is_small_enough(self, nbytes: int) -> bool:
        """Two of them, the new and the old, must leave the store to the run's own objects."""
        if nbytes <= self._rules.snapshot_bytes:
            return True
        self._rules.say(
            f"Note: a snapshot of the {self._group.name} takes {nbytes / 2**30:.1f} GiB of the object "
            f"store, and at most {self._rules.snapshot_bytes / 2**30:.1f} GiB are used for it. {WITHOUT} "
            "--snapshot_steps N takes them all the same, every N steps."
        )
        return False


def _write(part: SnapshotPart, arrays: Any, directory: str, rank: int) -> None:
    """In a process of its own: this one has no torch."""
    from raytune_rl.workers import snapshot

    snapshot.write(part, arrays, directory, rank)


def _failed(ref: ray.ObjectRef) -> bool:
    try:
        ray.get(ref, timeout=1.0)
    except GetTimeoutError:
        return False
    except RayError:
        return True
    return False
