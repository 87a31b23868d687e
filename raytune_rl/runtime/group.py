"""A group: N actors of one role, called together or one by one.

The group knows no role. It starts any worker class on its slots, names each actor for the errors, and gives
every call a deadline. A worker without a state of its own may be started anew when it is lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune_rl.errors import DeadlineExceededError, WorkerDiedError, WorkerHungError
from raytune_rl.runtime import fork_server, kernel_kills
from raytune_rl.runtime.device_env import worker_env
from raytune_rl.runtime.health import health
from raytune_rl.runtime.placement import GroupSpec, Slot
from raytune_rl.runtime.probe import ProgressProbe
from raytune_rl.runtime.wait import Pending, fetch_all

ATTEMPTS = 3
"""How often one call is made. What loses its worker each time is likely to be the call's own doing."""

PROBES = "probes"
"""Ray's concurrency group in which a worker's `progress` is answered."""


@dataclass(frozen=True)
class Call:
    """One call of a worker's method, as it is made once or again.

    Attributes:
        method: Its name.
        args: Its arguments; what is large among them is references.
        what: The work, as a person would name it.
        returns: Number of results, or "streaming" for a generator.
        timeout_s: Seconds that its answer may take.
    """

    method: str
    args: tuple[Any, ...]
    what: str
    returns: int | Literal["streaming"]
    timeout_s: float


@dataclass(frozen=True)
class Replacement:
    """The replacement of a worker that is lost.

    Attributes:
        set_up: What a new worker is called with first, to be as the others are.
        start_timeout_s: Seconds that it has for its start, beside its calls' own.
        tell: Told the group's name and a sentence for the user.
    """

    set_up: tuple[Call, ...]
    start_timeout_s: float
    tell: Callable[[str, str], None]


class WorkerGroup:
    """N workers of one role.

    Args:
        spec: The group's name and the resources of each worker.
        slots: One reserved place a worker, in rank order.
        worker_class: A plain class; each worker is one instance of it in its own process.
        make_args: Gives the constructor's keyword arguments for a rank.
        env: Environment of the workers' processes (set before anything is imported there).
        timeout_s: Default deadline of a call, seconds.
        at_once: False: no worker is started before `start` names it.

    Attributes:
        watch: What looks after the workers while an answer of theirs is awaited (`wait.Pending.watch`).
    """

    def __init__(
        self,
        spec: GroupSpec,
        slots: Sequence[Slot],
        worker_class: type,
        make_args: Callable[[int], Mapping[str, Any]],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
        at_once: bool = True,
    ) -> None:
        self.name = spec.name
        self.timeout_s = timeout_s
        self._slots = list(slots)
        self._start = lambda rank: start_worker(
            worker_class, spec, self._slots[rank], make_args(rank), env or {}
        )
        self._actors: list[Any] = [None] * len(slots)
        if at_once:
            self.start(range(len(slots)))
        self._replacement: Replacement | None = None
        self._set_up: dict[int, tuple[Pending, ...]] = {}
        self._hung: dict[int, str] = {}
        self.watch: Callable[[], None] | None = None

    def start(self, ranks: Sequence[int]) -> None:
        """Starts the workers of these ranks that have not been. Returns at once."""
        kernel_kills.at_start()
        for rank in ranks:
            if self._actors[rank] is None:
                self._actors[rank] = self._start(rank)

    def add(self, slot: Slot) -> int:
        """Starts one more worker, on a place of its own, and returns its rank. Returns at once."""
        self._slots.append(slot)
        self._actors.append(None)
        self.start([len(self) - 1])
        return len(self) - 1

    def replace_lost(
        self,
        start_timeout_s: float,
        tell: Callable[[str, str], None],
        set_up: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        """From now on a worker that is lost is started anew in its place, and its work is done again.

        Only for workers that answer the same call alike, whatever they were asked before.

        Args:
            start_timeout_s: Seconds that a new worker has for its start.
            tell: Told the group's name and a sentence for the user at each loss.
            set_up: Methods, with arguments, that make a new worker like the others.
        """
        calls = [Call(m, args, m, 1, start_timeout_s) for m, args in (set_up or {}).items()]
        self._replacement = Replacement(tuple(calls), start_timeout_s, tell)

    def replace_hung(self, limit_s: float) -> None:
        """From now on a worker is lost, too, that gives no sign of life for so many seconds while an answer
        of the group is awaited; 0: none is. For a class with `PROBED`, all of whose workers have started.
        """
        probe = ProgressProbe(len(self), self.ask_progress, progress_of, self.who, limit_s)
        probe.started()

        def look() -> None:
            try:
                probe.look()
            except WorkerHungError as hang:
                if hang.rank is None:
                    raise
                self._hung[hang.rank] = str(hang)
                ray.kill(self._actors[hang.rank])  # its calls fail, and are made again
                probe.forget_one(hang.rank)

        self.watch = look

    def leave_lost(self) -> None:
        """From now on the loss of a worker is the caller's to see to."""
        self._replacement = None

    def __len__(self) -> int:
        return len(self._actors)

    def who(self, rank: int) -> str:
        """A worker's name for messages, such as "rollout[1]"."""
        return f"{self.name}[{rank}]"

    def submit(
        self,
        rank: int,
        method: str,
        *args: Any,
        what: str | None = None,
        returns: int | Literal["streaming"] = 1,
        timeout_s: float | None = None,
    ) -> Pending:
        """Starts a call on one worker. With `returns > 1` the pending's `ref` is the list of its
        references; with "streaming" (a generator method) it is for `wait.stream`.
        """
        return self._make(rank, Call(method, args, what or method, returns, timeout_s or self.timeout_s))

    def _make(self, rank: int, call: Call, attempt: int = 1, hung: bool = False) -> Pending:
        actor, replacement = self._actors[rank], self._replacement
        pending = self._ask(rank, call)
        if replacement is None or call.returns == "streaming":
            return pending
        extra_s = replacement.start_timeout_s if attempt > 1 else 0.0

        def redo(loss: WorkerDiedError | DeadlineExceededError) -> Pending:
            hangs = isinstance(loss, DeadlineExceededError)
            if hangs and hung:
                raise DeadlineExceededError(f"{loss}\nA worker in its place hung at this work too.") from loss
            if attempt == ATTEMPTS:
                raise WorkerDiedError(f"{loss}\nIt was lost at this work {ATTEMPTS} times.") from loss
            if self._actors[rank] is actor:  # else another call was lost with it, and saw to that
                what = f"{self.who(rank)} did not finish '{call.what}' within {pending.timeout_s:.0f} s."
                known = self._hung.pop(rank, None)
                reason = f"{known}, during '{call.what}'." if known else str(loss).partition("\n")[0]
                self._replace(rank, what if hangs else reason, replacement)
            return self._make(rank, call, attempt + 1, hung or hangs)

        return replace(pending, redo=redo, timeout_s=call.timeout_s + extra_s)

    def _ask(self, rank: int, call: Call) -> Pending:
        remote = getattr(self._actors[rank], call.method)
        ref = remote.options(num_returns=call.returns).remote(*call.args)
        set_up = self._set_up.get(rank, ())
        return Pending(ref, self.who(rank), call.what, call.timeout_s, after=set_up, watch=self.watch)

    def ask_progress(self, rank: int) -> ray.ObjectRef:
        """Asks a worker of a class with `PROBED` how far it is; it answers beside its work."""
        return self._actors[rank].progress.options(concurrency_group=PROBES).remote()

    def restart(self) -> None:
        """Ends all workers, whatever they are doing, and starts all anew in their places. Returns at once."""
        for actor in self._actors:
            ray.kill(actor)
        self._set_up = {}
        self._actors = [self._start(rank) for rank in range(len(self._actors))]

    def _replace(self, rank: int, loss: str, replacement: Replacement) -> None:
        """Starts a worker anew. Returns at once: its calls wait for its start."""
        replacement.tell(self.name, f"{loss} It is started anew, and its work is done again.")
        self.renew(rank)
        self._set_up[rank] = tuple(self._ask(rank, call) for call in replacement.set_up)

    def renew(self, rank: int) -> None:
        """Ends a worker, whatever is left of it, and starts it anew in its place. Returns at once: calls of
        the new one wait for its start.
        """
        ray.kill(self._actors[rank])
        self._actors[rank] = self._start(rank)
        self._set_up[rank] = ()

    def call(
        self, method: str, *args: Any, what: str | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """Calls every worker with the same arguments and waits for all answers, in rank order."""
        return fetch_all(
            [self.submit(rank, method, *args, what=what, timeout_s=timeout_s) for rank in range(len(self))]
        )

    def map(self, method: str, per_rank: Sequence[Any], what: str | None = None) -> list[Any]:
        """Calls worker i with `per_rank[i]` and waits for all answers, in rank order."""
        if len(per_rank) != len(self):
            raise ValueError(f"{len(per_rank)} arguments for the {len(self)} workers of group {self.name!r}")
        return fetch_all([self.submit(rank, method, arg, what=what) for rank, arg in enumerate(per_rank)])

    def stop(self, rank: int) -> None:
        """Ends a worker for good, or until it is restarted; its place stays reserved."""
        ray.kill(self._actors[rank])

    def shutdown(self) -> None:
        """Ends the workers' processes. Their finished results stay readable."""
        for actor in self._actors:
            if actor is not None:
                end(actor)
        self._actors = []


def progress_of(ref: ray.ObjectRef) -> int | None:
    """The count that `ask_progress` asked for, once it is there. Of a dead worker none ever comes, which is
    for others to see.
    """
    done, _ = ray.wait([ref], timeout=0, fetch_local=True)
    if not done:
        return None
    try:
        return int(ray.get(ref, timeout=1.0))
    except RayError:
        return None


def end(actor: ray.actor.ActorHandle) -> None:
    """Ends an actor's process. Without the cluster's head no call to Ray would come back, and it ends with
    its node.
    """
    if not health().head_lost:
        ray.kill(actor)


def start_worker(
    worker_class: type, spec: GroupSpec, slot: Slot, kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> ray.actor.ActorHandle:
    """Starts one actor of `worker_class` on a slot. Returns at once; the first call waits for the
    constructor.
    """
    options: dict[str, Any] = {
        "num_cpus": spec.cpus,
        "num_gpus": spec.gpus,
        "resources": dict(spec.resources) or None,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            slot.placement_group, placement_group_bundle_index=slot.bundle_index
        ),
        "runtime_env": {
            "env_vars": worker_env(env, spec.gpus, os.environ),
            **fork_server.executable(getattr(worker_class, "STAGE", None)),
        },
        # Work is retried by the controller, which knows what may be repeated; Ray must not repeat it on its
        # own.
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if hasattr(worker_class, "CALLS_AT_ONCE"):
        options["max_concurrency"] = worker_class.CALLS_AT_ONCE
    # A class whose `progress` is asked beside its work: the work itself still comes one call after another.
    aside = {"concurrency_groups": {PROBES: 1}} if getattr(worker_class, "PROBED", False) else {}
    remote = ray.remote(**aside)(worker_class) if aside else ray.remote(worker_class)
    return remote.options(**options).remote(**kwargs)
