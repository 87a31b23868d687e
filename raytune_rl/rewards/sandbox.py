"""Reward functions in child processes: a sample that hangs, crashes or raises costs only itself."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Failure, RewardBatch, Scores, Unscored
from raytune_rl.rewards import child
from raytune_rl.rewards.lean_process import LeanContext
from raytune_rl.rewards.plugins import on_this_machine

# Time for a fresh child to import plugins and build its functions; the functions' own time starts afterwards.
START_LIMIT_S = 120.0
# Time for an answer to travel, on top of the time-out that pebble enforces.
_GRACE_S = 15.0


@dataclass(frozen=True)
class _Scored:
    outcomes: Sequence[child.Outcome]
    seconds: float
    slow_path: str | None


@dataclass(frozen=True)
class _Call:
    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    timeout_s: float


class Sandbox:
    """Reward functions, by name, in child processes of their own.

    Each function is first called once with the whole batch (*fast path*). When that call raises, takes longer
    than `timeout_s`, kills its process, or returns something else than one entry a completion, every sample
    is tried on its own (*slow path*; the samples of an async function all at once), so that only the guilty
    ones fail. A child that hangs or dies is replaced; its replacement is forked warm.

    How long can it take? A function's fast path ends after `timeout_s`, a sample of the slow path too, and
    the slow path as a whole starts no further sample once it has used `slow_path_s`; what is then left fails
    as `timeout` and says so. The sum over functions, start-up included, is `worst_case_s`.

    A sandbox serves one caller at a time.

    Attributes:
        names, labels: Registry and class names of the functions.
        required: Columns that each of them cannot do without.

    Args:
        names: Registry names, in the order of the columns of `Scores.values`.
        plugin_files: Files that register further functions.
        config: All settings of the run; constructors may ask for them.
        timeout_s: Seconds for one call.
        max_workers: Children; several score samples of the slow path, or functions, at the same time.
        memory_limit_bytes: Address space a child may use (RLIMIT_AS); beyond it, allocations raise
            MemoryError. It counts reserved as well as used memory, so leave room if a plugin imports torch.
        slow_path_s: Seconds for one function's slow path; `max(60, 20 * timeout_s)` if not given.

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
        slow_path_s: float | None = None,
    ) -> None:
        self.names = tuple(names)
        self._timeout_s = timeout_s
        self._slow_path_s = max(60.0, 20 * timeout_s) if slow_path_s is None else slow_path_s
        self._max_workers = max_workers
        self._spec = child.ChildSpec(self.names, on_this_machine(plugin_files), config, memory_limit_bytes)
        self._open: set[Future[Any]] = set()
        self._pool = self._new_pool()
        built = self._answer(self._call(child.describe))
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

    @property
    def worst_case_s(self) -> float:
        """Seconds within which `score` answers, whatever the functions do."""
        n = len(self.names)
        start = START_LIMIT_S + 2 * _GRACE_S  # up to three times: fast path, async slow path, last sample
        return n * (3 * start + (n + 2) * self._timeout_s + self._slow_path_s)

    def score(self, completions: list[str], columns: dict[str, Any]) -> Scores:
        """Scores a batch with every function.

        Args:
            completions: Generated texts, `n` of them.
            columns: Lists of length `n`, and other values for the whole batch (see `RewardBatch`); each
                function gets those it takes as keyword arguments.

        Raises:
            RewardError: A column's length is not `n`, or a function requires a column that is not there.
        """
        batch = RewardBatch(completions, columns)
        self._require_columns(batch)
        values = np.full((len(batch), len(self.names)), np.nan)
        failures: list[Failure] = []
        scored = self._score_all(batch) if len(batch) else [_Scored((), 0.0, None)] * len(self.names)
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
            missing = [column for column in required if column not in batch.columns]
            if missing:
                raise RewardError(
                    f"Reward `{name}` needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
                    f"; the rows have: {', '.join(sorted(batch.columns)) or 'none'}."
                )

    def _score_all(self, batch: RewardBatch) -> list[_Scored]:
        calls = [
            self._call(child.score, index, batch.texts, batch.columns) for index in range(len(self.names))
        ]
        scored: list[_Scored] = []
        for index, call in enumerate(calls):
            begin = time.monotonic()
            reply = self._answer(call, queued=index)
            problem = reply if isinstance(reply, Unscored) else reply.problem
            if problem is None:
                scored.append(_Scored(reply.outcomes, reply.seconds, None))
                continue
            outcomes = [problem] if len(batch) == 1 else self._slow_path(index, batch)
            scored.append(_Scored(outcomes, time.monotonic() - begin, f"{problem.kind}: {problem.message}"))
        return scored

    def _slow_path(self, index: int, batch: RewardBatch) -> Sequence[child.Outcome]:
        end = time.monotonic() + self._slow_path_s
        if self._is_async[index]:
            # The child keeps each sample to timeout_s; ours is for a sample that blocks the event loop.
            arguments = (index, batch.texts, batch.columns, self._timeout_s)
            reply = self._answer(
                self._call(child.score_each, *arguments, timeout_s=self._timeout_s + _GRACE_S)
            )
            if isinstance(reply, child.Reply) and reply.problem is None:
                return reply.outcomes
        outcomes: list[child.Outcome] = []
        for first in range(0, len(batch), self._max_workers):
            if time.monotonic() > end:
                spent = f"not tried: the samples before it used up the {self._slow_path_s:g} s for a batch"
                return outcomes + [Unscored(spent, "timeout")] * (len(batch) - first)
            samples = [batch.take([row]) for row in range(first, min(first + self._max_workers, len(batch)))]
            calls = [self._call(child.score, index, sample.texts, sample.columns) for sample in samples]
            replies = [self._answer(call) for call in calls]
            outcomes += [r if isinstance(r, Unscored) else r.problem or r.outcomes[0] for r in replies]
        return outcomes

    def _call(self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> _Call:
        timeout_s = timeout_s or self._timeout_s
        try:
            future = self._pool.schedule(function, args=args, timeout=timeout_s)
        except RuntimeError:  # a child died while idle, which pebble takes for the end of its pool
            self._renew()
            future = self._pool.schedule(function, args=args, timeout=timeout_s)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return _Call(future, function, args, timeout_s)

    def _answer(self, call: _Call, queued: int = 0, retry: bool = True) -> Any:
        """What a call returned, or an `Unscored` that says why it returned nothing.

        `queued` calls may have to end, each within its time-out, before this one begins.
        """
        limit_s = START_LIMIT_S + _GRACE_S + self._timeout_s * queued + call.timeout_s
        try:
            return call.future.result(timeout=limit_s)
        except TimeoutError:
            if call.future.done():
                return Unscored(f"no answer within {call.timeout_s:g} s", "timeout")
            self._renew()
            return Unscored(
                f"the reward process did not answer within {limit_s:g} s and was replaced", "crash"
            )
        except ProcessExpired as error:
            return Unscored(_how_it_died(error.exitcode), "crash")
        except (BrokenProcessPool, CancelledError):
            # A child died while it was busy with no call, so this one is innocent and gets another child.
            if not self._pool.active:
                self._renew()
            if retry:
                return self._answer(
                    self._call(call.function, *call.args, timeout_s=call.timeout_s), queued, retry=False
                )
            return Unscored("the reward process dies before it can be used", "crash")
        except (PicklingError, AttributeError, TypeError) as error:
            return Unscored(f"the columns cannot be sent to the reward process: {error}", "exception")

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._max_workers,
            initializer=child.prepare,
            initargs=(self._spec,),
            context=LeanContext(),
        )

    def _renew(self) -> None:
        self.close()
        self._pool = self._new_pool()


def memory_limit_bytes(gib: float) -> int | None:
    """`--reward_memory_limit` in bytes; 0 is no limit."""
    return int(gib * 2**30) or None


def _how_it_died(exit_code: int) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
        return f"the reward process was ended by {name}{hint}"
    return f"the reward process ended with exit code {exit_code}"
