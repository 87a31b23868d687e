"""Is the answer equal to the solution? Decided by math-verify, after both are read alike.

As ms-swift's `accuracy` in what counts as an answer (`answers`). Unlike there, both are read as LaTeX
wherever they stand; units, choice letters and words are compared as such (`reading`); and a solution that
cannot be read is reported, where a 0 would take the signal from the whole group without a word.
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.answers import answers_of, gold_of
from raytune_rl.rewards.base import ORM
from raytune_rl.rewards.reading import Reading, equal, read, read_said

# Enough for any honest answer, which takes milliseconds. CPU seconds, not wall seconds: on a busy machine a
# right answer must not turn into a failure.
SAMPLE_CPU_LIMIT_S = 2.0


class _OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify catch those and would carry on."""


class MathAccuracy(ORM):
    """1.0 if the answer is equal to the solution, else 0.0.

    The content of the first `<answer>` behind the thoughts is taken from completion and solution where there
    is one, else that of the last `\\boxed`. A completion without either has to give its answer in LaTeX,
    after the word "answer"; plain numbers in running text do not count.

    `Unscored` instead of a number: the row has no solution, the solution cannot be read, or the comparison
    takes more than `SAMPLE_CPU_LIMIT_S` (hostile expressions). An answer that cannot be read is wrong: 0.0.
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        super().__init__(args, **kwargs)
        # math-verify warns when its own timers are off; `_cpu_limit` stands in for all of them.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        _score(r"\boxed{1}", "1")  # compiles the patterns now and not within the first sample's time

    def __call__(
        self, completions: list[str], solution: list[str | float | None], **kwargs: Any
    ) -> list[float | Unscored]:
        return [_guarded(text, gold) for text, gold in zip(completions, solution, strict=True)]


def _guarded(text: str, gold: str | float | None) -> float | Unscored:
    if gold is None:
        return Unscored("the row has no `solution`")
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        gold = str(gold)  # JSON has numbers
    if not isinstance(gold, str):
        return Unscored(f"the `solution` is a {type(gold).__name__}, not a text or a number")
    try:
        with _cpu_limit(SAMPLE_CPU_LIMIT_S):
            return _score(str(text), gold)
    except _OutOfTime:
        return Unscored(
            f"math-verify took over {SAMPLE_CPU_LIMIT_S:g} CPU seconds on "
            f"{reprlib.repr((answers_of(text) or text)[-200:])} against the solution {reprlib.repr(gold)}",
            kind="timeout",
        )


def _score(text: str, gold: str) -> float | Unscored:
    expected = _read_gold(gold)
    if expected is None:
        return Unscored(
            f"no answer can be read in the solution {reprlib.repr(gold)}; write it as a number, in $...$ or "
            "in \\boxed{}"
        )
    try:
        answer = answers_of(text)
        if answer is not None:
            return _compared(answer, gold)
        given = read_said(text)
        return float(given is not None and equal(expected, given))
    except Exception:  # noqa: BLE001, nothing that sympy raises on an answer makes it right
        return 0.0


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> Reading | None:
    """Once for all completions of a prompt."""
    try:
        return read(gold_of(gold))
    except Exception:  # noqa: BLE001, whatever sympy raises, it cannot be read
        return None


@lru_cache(maxsize=4096)
def _compared(answer: str, gold: str) -> float:
    """Once for all completions of a prompt that give the same answer."""
    expected, given = _read_gold(gold), read(answer)
    return float(expected is not None and given is not None and equal(expected, given))


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `_OutOfTime` in the block once the process has spent `seconds` of CPU time in it.

    Python delivers signals between bytecodes and to the main thread alone: a single huge integer power is not
    interrupted (the sandbox kills its process then), and outside a main thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # repeats, should anything swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, previous)
