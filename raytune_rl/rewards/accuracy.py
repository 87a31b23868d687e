"""Is the answer mathematically equal to the solution? Decided by math-verify.

Rules of ms-swift's `accuracy`, with one difference: a solution that cannot be parsed is reported, where
ms-swift scores it 0 and so takes the signal from the whole group without a word.
"""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.base import ORM

# Enough for any honest answer, which takes milliseconds. CPU seconds, not wall seconds: on a busy machine a
# right answer must not turn into a failure.
SAMPLE_CPU_LIMIT_S = 2.0

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class _OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify catch those and would carry on."""


class MathAccuracy(ORM):
    """1.0 if math-verify finds the answer equal to the solution, else 0.0.

    The content of the first `<answer>` is taken from completion and solution where there is one. A completion
    without the tag has to give its answer in LaTeX, `\\boxed` first; plain numbers in running text do not
    count.

    `Unscored` instead of a number: the row has no solution, the solution cannot be parsed, or the comparison
    takes more than `SAMPLE_CPU_LIMIT_S` (hostile expressions). An answer that cannot be parsed is wrong: 0.0.
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        super().__init__(args, **kwargs)
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig

        # math-verify warns when its own timers are off; `_cpu_limit` stands in for all of them.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._latex_only = [
            LatexExtractionConfig(
                normalization_config=NormalizationConfig(
                    nits=False, malformed_operators=False, basic_latex=True, boxed=True, units=True
                ),
                boxed_match_priority=0,
                try_extract_without_anchor=False,
            )
        ]
        self._score(r"\boxed{1}", "1")  # compiles the patterns now and not within the first sample's time

    def __call__(
        self, completions: list[str], solution: list[str | float | None], **kwargs: Any
    ) -> list[float | Unscored]:
        return [self._guarded(text, gold) for text, gold in zip(completions, solution, strict=True)]

    def _guarded(self, text: str, gold: str | float | None) -> float | Unscored:
        if gold is None:
            return Unscored("the row has no `solution`")
        if isinstance(gold, (int, float)) and not isinstance(gold, bool):
            gold = str(gold)  # JSON has numbers
        if not isinstance(gold, str):
            return Unscored(f"the `solution` is a {type(gold).__name__}, not a text or a number")
        try:
            with _cpu_limit(SAMPLE_CPU_LIMIT_S):
                return self._score(text, gold)
        except _OutOfTime:
            return Unscored(
                f"math-verify took over {SAMPLE_CPU_LIMIT_S:g} CPU seconds on {reprlib.repr(_tail(text))} "
                f"against the solution {reprlib.repr(gold)}",
                kind="timeout",
            )

    def _score(self, text: str, gold: str) -> float | Unscored:
        from math_verify import parse, verify

        gold_match = _ANSWER.search(gold)
        expected = parse(
            gold_match[1].strip() if gold_match else gold, extraction_mode="first_match", parsing_timeout=None
        )
        if not expected:
            return Unscored(
                f"math-verify finds no mathematics in the solution {reprlib.repr(gold)}; write it as a "
                f"number, in $...$ or in \\boxed{{}}"
            )
        answer = _ANSWER.search(text)
        if answer:
            given = parse(answer[1].strip(), extraction_mode="first_match", parsing_timeout=None)
        else:
            given = parse(text, self._latex_only, extraction_mode="first_match", parsing_timeout=None)
        return float(verify(expected, given, timeout_seconds=None))


def _tail(text: str) -> str:
    """The part of a completion where its answer is likely to be, for a message."""
    answer = _ANSWER.search(text)
    return answer[1] if answer else text[-200:]


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
