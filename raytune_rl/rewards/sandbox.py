"""Reward functions in child processes: a sample that hangs, crashes or raises costs only itself."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Failure, RewardBatch, Scores, Unscored, missing_columns
from raytune_rl.rewards import child, keeper
from raytune_rl.rewards.keeper import START_LIMIT_S, Limits
from raytune_rl.rewards.lean_process import LeanContext
from raytune_rl.rewards.plugins import on_this_machine

# Time for an answer to travel, on top of the limits that the keeper enforces.
_GRACE_S = 15.0
# A function of which the first samples, this many, all ran into the limit or lost their process hangs or
# crashes as such; the rest would only cost time.
GIVE_UP_AFTER = 5


@dataclass(frozen=True)
class _Scored:
    outcomes: Sequence[child.Outcome]
    seconds: float
    slow_path: str | None


@dataclass(frozen=True)
class _Call:
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    limit_s: float


class Sandbox:
    """Reward functions, by name, in child processes of their own.

    Each function is first called once with the whole batch (*fast path*). When that call raises, takes too
    long or kills its process, every sample is tried on its own (*slow path*; the samples of an async function
    all at once), so that only the guilty ones fail. What returns something else than one entry a completion
    cannot be trusted with one either: the whole batch fails as `invalid`.

    How long can it take? `timeout_s` is for one completion. A batch has as many times that as it has
    completions; where its progress can be seen (`child.Watched`; finished tasks of an async function) it ends
    as soon as one completion takes longer. A function that ran into the limit with a whole batch has only
    `timeout_s` for the next ones, until one succeeds. The slow path gives a function up of which the first
    `GIVE_UP_AFTER` samples hang or crash. And `score` as a whole answers within `limit_s`, shared out among
    the functions: what is then left fails as `timeout` and says so. Whatever a function had started when it
    passed a limit is ended with it (`keeper`).

    A sandbox serves one caller at a time.

    Attributes:
        names, labels: Registry and class names of the functions.
        required: Columns that each of them cannot do without.

    Args:
        names: Registry names, in the order of the columns of `Scores.values`.
        plugin_files: Files that register further functions.
        config: All settings of the run; constructors may ask for them.
        timeout_s: Seconds for one completion.
        max_workers: Children; several score samples of the slow path, or functions, at the same time.
        memory_limit_bytes: Address space a child may use (RLIMIT_AS); beyond it, allocations raise
            MemoryError. It counts reserved as well as used memory, so leave room if a plugin imports torch.

    Raises:
        RewardError: A name is unknown, a plugin cannot be loaded, or the children do not start.
    """

    def __init__(
        self,
        names: Sequence[str],
        plugin_files: Sequence[str],
        config: dict[str, Any],
        timeout_s: float,
        max_workers: int = 1,
        *,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self.names = tuple(names)
        self._timeout_s = timeout_s
        self._hung: set[int] = set()
        self._max_workers = max_workers
        self._spec = child.ChildSpec(self.names, on_this_machine(plugin_files), config, memory_limit_bytes)
        self._open: set[Future[Any]] = set()
        self._pool = self._new_pool()
        built = self._answer(self._submit(keeper.describe, (), 0.0))
        if isinstance(built, Unscored) or built.error:
            self.close()
            raise RewardError(
                built.error
                if isinstance(built, child.Built) and built.error
                else f"The reward processes did not start: {built.message}"
            )
        self.labels: tuple[str, ...] = built.labels
        self.required: tuple[tuple[str, ...], ...] = built.required
        self._is_async: tuple[bool, ...] = built.is_async

    def score(self, completions: list[str], columns: dict[str, Any], limit_s: float | None = None) -> Scores:
        """Scores a batch with every function.

        Args:
            completions: Generated texts, `n` of them.
            columns: Lists of length `n`, and other values for the whole batch (see `RewardBatch`); each
                function gets those it takes as keyword arguments.
            limit_s: Seconds within which to answer, whatever the functions do; None for as long as the
                samples' own limits allow.

        Raises:
            RewardError: A column's length is not `n`, or a function requires a column that is not there.
        """
        batch = RewardBatch(completions, columns)
        self._require_columns(batch)
        values = np.full((len(batch), len(self.names)), np.nan)
        failures: list[Failure] = []
        end = math.inf if limit_s is None else time.monotonic() + limit_s
        scored = self._score_all(batch, end) if len(batch) else [_Scored((), 0.0, None)] * len(self.names)
        for index, (name, column) in enumerate(zip(self.names, scored, strict=True)):
            for row, outcome in enumerate(column.outcomes):
                if isinstance(outcome, Unscored):
                    failures.append(Failure(row, name, outcome.kind, outcome.message))
                elif outcome is not None:
                    values[row, index] = outcome
        return Scores(
            functions=self.names,
            labels=self.labels,
            values=values,
            failures=tuple(failures),
            seconds=tuple(column.seconds for column in scored),
            slow_path=tuple(column.slow_path for column in scored),
        )

    def close(self) -> None:
        """Ends the children; what they were busy with is lost. A closed sandbox cannot be used again."""
        self._pool.stop()
        # A pool whose pipe is broken may never finish joining, and nothing depends on it.
        joining = threading.Thread(target=self._pool.join, daemon=True)
        joining.start()
        joining.join(_GRACE_S)
        for future in list(self._open):
            future.cancel()

    def _require_columns(self, batch: RewardBatch) -> None:
        for name, required in zip(self.names, self.required, strict=True):
            missing = missing_columns(required, batch.columns)
            if missing:
                raise RewardError(
                    f"Reward `{name}` needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
                    f"; the rows have: {', '.join(sorted(batch.columns)) or 'none'}."
                )

    def _score_all(self, batch: RewardBatch, end: float) -> list[_Scored]:
        count = len(self.names)
        # Half of its share for the whole batch at once: the other half is for the samples on their own.
        half_s = (end - time.monotonic()) / (2 * count)
        calls = []
        for index in range(count):
            whole_s = self._timeout_s * (1 if index in self._hung else len(batch))
            limits = Limits(min(whole_s, half_s), self._timeout_s)
            calls.append(self._call("score", (index, batch.texts, batch.columns), limits))
        scored: list[_Scored] = []
        queued_s = 0.0
        for index, call in enumerate(calls):
            begin = time.monotonic()
            queued_s += call.limit_s if isinstance(call, _Call) else 0.0
            reply = self._answer(call, queued_s, end)
            problem = reply if isinstance(reply, Unscored) else reply.problem
            if problem is None:
                self._hung.discard(index)
                scored.append(_Scored(reply.outcomes, reply.seconds, None))
                continue
            if problem.kind == "timeout":
                self._hung.add(index)
            if len(batch) == 1 or problem.kind == "invalid":
                scored.append(_Scored([problem] * len(batch), time.monotonic() - begin, None))
                continue
            share_s = (end - time.monotonic()) / (count - index)
            outcomes = self._slow_path(index, batch, time.monotonic() + share_s)
            scored.append(_Scored(outcomes, time.monotonic() - begin, f"{problem.kind}: {problem.message}"))
        return scored

    def _slow_path(self, index: int, batch: RewardBatch, end: float) -> Sequence[child.Outcome]:
        if self._is_async[index]:
            # The child keeps each sample to timeout_s; ours is for a sample that blocks the event loop.
            arguments = (index, batch.texts, batch.columns, self._timeout_s)
            limit_s = min(self._timeout_s + _GRACE_S, (end - time.monotonic()) / 2)
            reply = self._answer(self._call("score_each", arguments, Limits(limit_s, limit_s)), limit_s, end)
            if isinstance(reply, child.Reply) and reply.problem is None:
                return reply.outcomes
        outcomes: list[child.Outcome] = []
        for first in range(0, len(batch), self._max_workers):
            left_s = end - time.monotonic()
            if why := self._reason_to_stop(outcomes, left_s):
                return outcomes + [Unscored(f"not tried: {why}", "timeout")] * (len(batch) - first)
            # Half of what is left, while others wait behind: one that hangs does not take their time too.
            last = first + self._max_workers >= len(batch)
            limit_s = min(self._timeout_s, left_s if last else left_s / 2)
            samples = [batch.take([row]) for row in range(first, min(first + self._max_workers, len(batch)))]
            calls = [
                self._call("score", (index, sample.texts, sample.columns), Limits(limit_s, limit_s))
                for sample in samples
            ]
            replies = [self._answer(call, limit_s, end) for call in calls]
            outcomes += [r if isinstance(r, Unscored) else r.problem or r.outcomes[0] for r in replies]
        return outcomes

    @staticmethod
    def _reason_to_stop(outcomes: Sequence[child.Outcome], left_s: float) -> str | None:
        if left_s <= 0:
            return "the samples before it used up the time for the batch"
        if len(outcomes) < GIVE_UP_AFTER:
            return None
        lost = [o for o in outcomes if isinstance(o, Unscored) and o.kind in ("timeout", "crash")]
        if len(lost) < len(outcomes):
            return None
        return f"the function is given up, as the first {len(lost)} samples fared alike ({lost[0].message})"

    def _call(self, method: str, arguments: tuple[Any, ...], limits: Limits) -> _Call | Unscored:
        try:
            pickled = pickle.dumps(arguments)
        except Exception as error:  # noqa: BLE001, whatever a column's own class raises
            return Unscored(f"the columns cannot be sent to the reward process: {error}", "exception")
        return self._submit(keeper.call, (method, pickled, limits), limits.whole_s)

    def _submit(self, function: Callable[..., Any], arguments: tuple[Any, ...], limit_s: float) -> _Call:
        try:
            future = self._pool.schedule(function, args=arguments)
        except RuntimeError:  # a child died while idle, which pebble takes for the end of its pool
            self._renew()
            future = self._pool.schedule(function, args=arguments)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return _Call(future, function, arguments, limit_s)

    def _answer(
        self, call: _Call | Unscored, queued_s: float = 0.0, end: float = math.inf, retry: bool = True
    ) -> Any:
        """The value that a call returned, or an `Unscored` that says why it returned nothing.

        The keeper keeps functions to their limits, so waiting ends here only if the keeper itself does not
        answer, or the time for all functions is over: after `queued_s` (for this call and those before it,
        beside the start of a process), or at `end`.
        """
        if isinstance(call, Unscored):
            return call
        patience_s = min(START_LIMIT_S + _GRACE_S + queued_s, max(0.0, end - time.monotonic()) + 1.0)
        try:
            return call.future.result(timeout=patience_s)
        except TimeoutError:
            self._renew()
            over = "the time for the batch is over" if time.monotonic() > end else "it was replaced"
            return Unscored(f"the reward process did not answer within {patience_s:.3g} s; {over}", "timeout")
        except ProcessExpired as error:
            return Unscored(keeper.how_it_died(error.exitcode), "crash")
        except (BrokenProcessPool, CancelledError):
            # A child died while it was busy with no call, so this one is innocent and gets another child.
            if not self._pool.active:
                self._renew()
            if retry:
                again = self._submit(call.function, call.arguments, call.limit_s)
                return self._answer(again, queued_s, end, retry=False)
            return Unscored("the reward process dies before it can be used", "crash")

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._max_workers,
            initializer=keeper.prepare,
            initargs=(self._spec,),
            context=LeanContext(),
        )

    def _renew(self) -> None:
        self.close()
        self._pool = self._new_pool()


def memory_limit_bytes(gib: float) -> int | None:
    """`--reward_memory_limit` in bytes; 0 is no limit."""
    return int(gib * 2**30) or None
