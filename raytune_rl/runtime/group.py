"""A group: N actors of one role, called together or one by one.

The group knows no role. It starts any worker class on its slots, names each actor for the errors, and gives
every call a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune_rl.runtime.placement import GroupSpec, Slot
from raytune_rl.runtime.wait import Pending, fetch_all


class WorkerGroup:
    """N workers of one role.

    Args:
        spec: The group's name and the resources of each worker.
        slots: One reserved place a worker, in rank order.
        worker_class: A plain class; each worker is one instance of it in its own process.
        make_args: Gives the constructor's keyword arguments for a rank.
        env: Environment of the workers' processes (set before anything is imported there).
        timeout_s: Default deadline of a call, seconds.
    """

    def __init__(
        self,
        spec: GroupSpec,
        slots: Sequence[Slot],
        worker_class: type,
        make_args: Callable[[int], Mapping[str, Any]],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = spec.name
        self.timeout_s = timeout_s
        self._actors = [
            start_worker(worker_class, spec, slot, make_args(rank), env or {})
            for rank, slot in enumerate(slots)
        ]

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
        remote = getattr(self._actors[rank], method)
        ref = remote.options(num_returns=returns).remote(*args)
        return Pending(ref, self.who(rank), what or method, timeout_s or self.timeout_s)

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

    def shutdown(self) -> None:
        """Ends the workers' processes. Their finished results stay readable."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


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
        "runtime_env": {"env_vars": dict(env)},
        # Work is retried by the controller, which knows what may be repeated; Ray must not repeat it on its
        # own.
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    return ray.remote(worker_class).options(**options).remote(**kwargs)
