"""The process of the reward functions (see `keeper`): they are called on what the parent sends.

They run in its main thread, which is where signal-based timers work. Nothing here raises into the parent:
every outcome is a value.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import mmap
import numbers
import os
import pickle
import resource
import struct
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored, take_rows
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.registry import RewardFunction, build, describe_error
from raytune_rl.rewards.shims import swift_importable

Outcome = float | Unscored | None

# What the process shows the keeper, in shared memory: whether it has begun with a call, and when it last got
# on (time.monotonic; 0 where that cannot be seen).
PROGRESS = "dd"
NOT_BEGUN = struct.pack(PROGRESS, 0.0, 0.0)


@dataclass(frozen=True)
class ChildSpec:
    """Settings from which a child builds its reward functions."""

    names: tuple[str, ...]
    plugin_files: tuple[str, ...]
    config: dict[str, Any]
    memory_limit_bytes: int | None


@dataclass(frozen=True)
class Built:
    """The reward functions that a child has built: each function's label, needed columns, whether async; or
    why it could not.
    """

    labels: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()
    is_async: tuple[bool, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Reply:
    """Answer to one call: an outcome a sample, or a problem that concerns the call as a whole."""

    outcomes: tuple[Outcome, ...]
    problem: Unscored | None
    seconds: float


# The process serves one sandbox for its whole life, so what it built is its own state.
_functions: list[RewardFunction] = []
_built = Built(error="the process was not prepared")
_loop: asyncio.Runner | None = None
_progress: mmap.mmap | None = None
_awaiting = False


class Watched(list[str]):
    """Completions that tell the keeper each time that a function takes the next one.

    So one that goes through them in a loop has its time for each. Where they are all taken at once nothing
    can be seen, and the limit for the whole call holds.
    """

    def __iter__(self) -> Iterator[str]:
        try:
            for completion in super().__iter__():
                _note_progress()
                yield completion
        finally:
            _note_no_progress()

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(super().__iter__()),)


def _note_progress(*_: Any) -> None:
    _show_progress(time.monotonic())


def _note_no_progress() -> None:
    if not _awaiting:
        _show_progress(0.0)


def _show_progress(seen: float) -> None:
    if _progress is not None:
        _progress[: len(NOT_BEGUN)] = struct.pack(PROGRESS, 1.0, seen)


def serve(pipe: Connection, progress: mmap.mmap, spec: ChildSpec) -> None:
    """Builds the functions and answers calls for as long as the keeper lives."""
    global _progress
    _progress = progress
    _prepare(spec)
    pipe.send(_built)
    while True:
        try:
            method, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        _show_progress(0.0)
        try:
            function: Callable[..., Reply] = score if method == "score" else score_each
            reply = function(*pickle.loads(arguments))
        except Exception as error:  # noqa: BLE001, a column of a class that cannot be had here
            reply = Reply((), Unscored(describe_error(error), "exception"), 0.0)
        pipe.send(reply)


def _prepare(spec: ChildSpec) -> None:
    """A failure is kept in `_built`: raised, it would be lost."""
    global _built, _functions
    os.environ["OMP_NUM_THREADS"] = "1"  # many children share the machine's cores
    if spec.memory_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (spec.memory_limit_bytes, spec.memory_limit_bytes))
    try:
        load_plugins(spec.plugin_files)
        with swift_importable():  # constructors may import from it too
            _functions = build(spec.names, spec.config)
    except RewardError as error:
        _built = Built(error=str(error))
        return
    except BaseException as error:  # noqa: BLE001, the parent reports it
        _built = Built(error=f"The reward functions cannot be built: {describe_error(error)}")
        return
    _built = Built(
        labels=tuple(function.label for function in _functions),
        required=tuple(function.required for function in _functions),
        is_async=tuple(function.is_async for function in _functions),
    )


def score(index: int, completions: list[str], columns: dict[str, Any]) -> Reply:
    """Calls function `index` once with the whole batch."""
    begin = time.perf_counter()
    if _built.error is not None:  # a new process, and the plugin has changed since the first one started
        return Reply((), Unscored(_built.error, "exception"), 0.0)
    try:
        result = _functions[index](Watched(completions), columns)
        if inspect.isawaitable(result):
            result = _run(_await(result))
        outcomes, problem = _check(result, len(completions))
    except BaseException as error:  # noqa: BLE001, a reward may raise anything, SystemExit included
        outcomes, problem = (), Unscored(describe_error(error), "exception")
    return Reply(outcomes, problem, time.perf_counter() - begin)


def score_each(index: int, completions: list[str], columns: dict[str, Any], timeout_s: float) -> Reply:
    """Calls the async function `index` once a sample, all at the same time, each with its own time-out."""
    begin = time.perf_counter()
    if _built.error is not None:
        return Reply((), Unscored(_built.error, "exception"), 0.0)

    async def one(row: int) -> Outcome:
        try:
            call = _functions[index]([completions[row]], take_rows(columns, [row]))
            outcomes, problem = _check(await asyncio.wait_for(call, timeout_s), 1)
        except TimeoutError:
            return Unscored(f"no answer within {timeout_s:g} s", "timeout")
        except Exception as error:  # noqa: BLE001, whatever a reward raises is that sample's outcome
            return Unscored(describe_error(error), "exception")
        return problem or outcomes[0]

    async def all_of_them() -> list[Outcome]:
        return await asyncio.gather(*(one(row) for row in range(len(completions))))

    try:
        return Reply(tuple(_run(all_of_them())), None, time.perf_counter() - begin)
    except BaseException as error:  # noqa: BLE001, see score
        return Reply((), Unscored(describe_error(error), "exception"), time.perf_counter() - begin)


async def _await(result: Any) -> Any:
    return await result


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine; each task that it finishes is progress."""
    # One loop for the process's life: a client session that a reward keeps between calls stays usable.
    global _loop, _awaiting
    if _loop is None:
        _loop = asyncio.Runner()
        _loop.get_loop().set_task_factory(_counted)
    _note_progress()
    _awaiting = True
    try:
        return _loop.run(coroutine)
    finally:
        _awaiting = False


def _counted(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **options)
    task.add_done_callback(_note_progress)
    return task


def _check(result: Any, n: int) -> tuple[tuple[Outcome, ...], Unscored | None]:
    """A reward's return value as plain outcomes; the second entry says what is wrong with it as a whole.

    A set has no order, a mapping and an iterator are no list either: none can be told by completion.
    """
    if not isinstance(result, Sequence) and getattr(result, "ndim", None) and hasattr(result, "tolist"):
        result = result.tolist()  # an array, a tensor, a series
    if isinstance(result, (str, bytes)) or not isinstance(result, Sequence):
        return (), Unscored(f"returned a {type(result).__name__}, not a list of {n} numbers")
    if len(result) != n:
        return (), Unscored(f"returned {len(result)} values for {n} completions")
    return tuple(_outcome(value) for value in result), None


def _outcome(value: Any) -> Outcome:
    if value is None:
        return None
    if isinstance(value, Unscored):
        return Unscored(str(value.message), value.kind)  # a plugin's subclass could not be read elsewhere
    if not isinstance(value, (str, bytes)) and hasattr(value, "item"):
        value = value.item()  # a numpy or torch scalar
    if not isinstance(value, numbers.Real):
        return Unscored(f"returned a {type(value).__name__}, not a number")
    number = float(value)
    return number if math.isfinite(number) else Unscored(f"returned {number}")
