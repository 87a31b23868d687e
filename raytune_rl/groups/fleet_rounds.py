"""Calls that several members of a fleet are to answer, some of which may be lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Round:
    """One call on several members.

    Attributes:
        owed: Who has not answered.
        future: Gets what is `made` of the answers of those that lived to give one.
        patient: Whether one that is lost is waited for until it was started anew.
    """

    owed: set[int]
    future: Future[Any]
    made: Callable[[list[Any]], Any]
    patient: bool = False
    answers: list[Any] = field(default_factory=list)

    def take(self, number: int, answer: Any = None) -> None:
        """One has answered; None: it is gone."""
        if number not in self.owed:
            return
        self.owed.discard(number)
        if answer is not None:
            self.answers.append(answer)
        self.settle()

    def settle(self) -> None:
        """Answers, if all have."""
        if not self.owed and not self.future.done():
            self.future.set_result(self.made(self.answers))


class Rounds:
    """All calls that somebody still owes an answer."""

    def __init__(self) -> None:
        self._open: list[Round] = []

    def begin(self, made: Round) -> None:
        """One more; it may be over at once."""
        made.settle()
        self._open.append(made)
        self._tidy()

    def arrived(self, number: int, answer: Any, own: Round | None) -> None:
        """A member serves: its own call is answered, and those that waited for its start."""
        for one in self._open:
            if one is own or one.patient:
                one.take(number, answer)
        self._tidy()

    def lost(self, number: int, *, for_good: bool) -> None:
        """A member is gone: nobody waits for it, unless it is started anew and the call is patient."""
        for one in self._open:
            if for_good or not one.patient:
                one.take(number)
        self._tidy()

    def fail(self, error: Exception) -> None:
        """Whoever waits is told."""
        for one in self._open:
            if not one.future.done():
                one.future.set_exception(error)
        self._open.clear()

    def _tidy(self) -> None:
        self._open = [one for one in self._open if one.owed]
