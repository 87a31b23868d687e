"""What runs inside a sandbox's child process: the reward functions, called on what the parent sends.

A child is its process's main thread, which is where signal-based timers work. Nothing here raises into the
parent: every outcome is a value.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import os
import resource
import signal
import time
from dataclasses import dataclass
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored, take_rows
from raytune_rl.rewards.lean_process import die_with_parent
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.registry import RewardFunction, build, describe_error
from raytune_rl.rewards.shims import swift_importable

Outcome = float | Unscored | None


@dataclass(frozen=True)
class ChildSpec:
    """What a child needs to build its reward functions."""

    names: tuple[str, ...]
    plugin_files: tuple[str, ...]
    config: dict[str, Any]
    memory_limit_bytes: int | None


@dataclass(frozen=True)
class Built:
    """What a child has built: each function's label, needed columns, whether async; or why it could not."""

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


# One child serves one sandbox for its whole life, so what it built is the process's own state.
_functions: list[RewardFunction] = []
_built = Built(error="the child was not prepared")
_loop: asyncio.Runner | None = None


def prepare(spec: ChildSpec) -> None:
    """Runs once when the child starts.

    A failure is kept for `describe`: an initializer that raises would only be started again.
    """
    global _built, _functions
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for C code that never returns
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
    except Exception as error:  # noqa: BLE001, the parent reports it; raised here it would be lost
        _built = Built(error=f"The reward functions cannot be built: {describe_error(error)}")
        return
    _built = Built(
        labels=tuple(function.label for function in _functions),
        required=tuple(function.required for function in _functions),
        is_async=tuple(function.is_async for function in _functions),
    )


def describe() -> Built:
    """What `prepare` came to."""
    return _built


def score(index: int, completions: list[str], columns: dict[str, Any]) -> Reply:
    """Calls function `index` once with the whole batch."""
    begin = time.perf_counter()
    if _built.error is not None:  # a replaced child, and the plugin has changed since the first one started
        return Reply((), Unscored(_built.error, "exception"), 0.0)
    try:
        result = _functions[index](completions, columns)
        if inspect.isawaitable(result):
            result = _runner().run(_await(result))
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
        return Reply(tuple(_runner().run(all_of_them())), None, time.perf_counter() - begin)
    except BaseException as error:  # noqa: BLE001, see score
        return Reply((), Unscored(describe_error(error), "exception"), time.perf_counter() - begin)


async def _await(result: Any) -> Any:
    return await result


def _runner() -> asyncio.Runner:
    # One loop for the child's life: a client session that a reward keeps between calls stays usable.
    global _loop
    if _loop is None:
        _loop = asyncio.Runner()
    return _loop


def _check(result: Any, n: int) -> tuple[tuple[Outcome, ...], Unscored | None]:
    """A reward's return value as plain outcomes; the second entry says what is wrong with it as a whole."""
    if isinstance(result, (str, bytes, dict)) or not (
        hasattr(result, "__len__") and hasattr(result, "__iter__")
    ):
        return (), Unscored(f"returned a {type(result).__name__}, not a list of {n} numbers")
    if len(result) != n:
        return (), Unscored(f"returned {len(result)} values for {n} completions")
    return tuple(_outcome(value) for value in result), None


def _outcome(value: Any) -> Outcome:
    if value is None or isinstance(value, Unscored):
        return value
    if not isinstance(value, (str, bytes)) and hasattr(value, "item"):
        value = value.item()  # a numpy or torch scalar
    if not isinstance(value, numbers.Real):
        return Unscored(f"returned a {type(value).__name__}, not a number")
    number = float(value)
    return number if math.isfinite(number) else Unscored(f"returned {number}")
