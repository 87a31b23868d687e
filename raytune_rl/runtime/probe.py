"""Does a group of workers get on? Asked beside their work, so that a hang is seen long before the deadline of
the work itself.

A process that is stopped, or dead-locked with Python's lock held, answers nothing: it is named. In a
collective that never returns all answer and none gets on: there the whole is named. One that is slow gets on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytune_rl.errors import WorkerHungError
from raytune_rl.runtime.attention import Attention

PATIENCE = 20.0
"""A world stands still when nothing was counted for so many times the longest pause seen in it."""
SHARE = 5.0
"""And for so many times the limit of an answer, whatever the pauses were."""


@dataclass
class Look:
    """What is known of one worker.

    Attributes:
        question: The open one; None: it may be asked.
        asked: When.
        answered: Whether it ever did, or has worked: before, it may only be starting.
        count: Its last.
    """

    question: Any = None
    asked: float = 0.0
    answered: bool = False
    count: int = 0


class ProgressProbe:
    """Looks at the workers of a group while something is awaited of them.

    Args:
        workers: How many.
        ask: Asks one how far it is.
        answer: The answer to a question: a count that grows as it works; None: there is none yet.
        who: A worker's name.
        limit_s: Seconds without an answer that make a hang; 0: nobody is asked.
        clock: Seconds.
    """

    def __init__(
        self,
        workers: int,
        ask: Callable[[int], Any],
        answer: Callable[[Any], int | None],
        who: Callable[[int], str],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._ask, self._answer, self._who = workers, ask, answer, who
        self._limit_s, self._clock = limit_s, clock
        self.forget()

    def forget_one(self, rank: int) -> None:
        """A worker is another from now on."""
        self._looks[rank] = Look()

    def forget(self) -> None:
        """The workers are others from now on."""
        self._looks = [Look() for _ in range(self._workers)]
        self._attention = Attention(self._limit_s / 2)
        self._moved = self._clock()
        self._longest_s: float | None = None
        self._counting = False

    def started(self) -> None:
        """All have done work, so that none may be only starting."""
        for one in self._looks:
            one.answered = True

    def counting(self, begins: bool) -> None:
        """The work that is counted begins or has ended; its pauses are measured between."""
        self._counting, self._moved = begins, self._clock()

    def look(self) -> None:
        """Looks once; to be called every second or so.

        Raises:
            WorkerHungError: One does not answer, or all stand still.
        """
        if not self._limit_s:
            return
        now = self._clock()
        if self._attention.missed(now):
            for one in self._looks:
                one.asked = now
            self._moved = now
        before = [one.count for one in self._looks]
        for rank, one in enumerate(self._looks):
            self._look_at(rank, one, now)
        if before != [one.count for one in self._looks] or not self._counting:
            if self._counting:
                self._longest_s = max(self._longest_s or 0.0, now - self._moved)
            self._moved = now
        elif self._longest_s is not None:
            still = now - self._moved
            if still > max(SHARE * self._limit_s, PATIENCE * self._longest_s):
                raise WorkerHungError(
                    f"{self._who(0)} to {self._who(self._workers - 1)} answer, but none of them got on for "
                    f"{still:.0f} s: a collective that never returns"
                )

    def _look_at(self, rank: int, one: Look, now: float) -> None:
        if one.question is not None:
            count = self._answer(one.question)
            if count is not None:
                one.question, one.answered, one.count = None, True, count
            elif one.answered and now - one.asked > self._limit_s:
                error = WorkerHungError(
                    f"{self._who(rank)} gives no sign of life for {now - one.asked:.0f} s: it hangs"
                )
                error.rank = rank
                raise error
        if one.question is None:
            one.question, one.asked = self._ask(rank), now
