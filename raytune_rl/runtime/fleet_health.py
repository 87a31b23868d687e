"""How the members of a fleet are: a state machine without clocks, processes or Ray.

It is told what was seen of a member, and when, and answers with what is to be done. A member serves only
after it has pulled weights; one that is busy and makes no progress, or does not answer at all, is first a
suspect and then lost, by name, long before a call's own deadline. One that makes progress, however slow, is
never taken for lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

from raytune_rl.runtime.attention import Attention

AWAY = 5
"""Probes' distances after which whoever listens has been away itself: stopped, or swapped out."""


class Status(Enum):
    """Of a member."""

    STARTING = auto()
    """Its process is being started, or waits for its place."""
    STALE = auto()
    """It is up and has no weights to serve yet."""
    SERVING = auto()
    SUSPECT = auto()
    """It serves, but has made no progress for half of the time that it may take."""
    LOST = auto()
    RETIRED = auto()


@dataclass(frozen=True)
class Started:
    """Its process is up."""


@dataclass(frozen=True)
class Pulling:
    """It was told to pull weights."""


@dataclass(frozen=True)
class Pulled:
    """It serves weights."""


@dataclass(frozen=True)
class Progress:
    """It answered a probe.

    Attributes:
        steps: A count that rises while it works.
        busy: Whether it has work.
        slowest_step_s: Its longest step so far, seconds.
    """

    steps: int
    busy: bool
    slowest_step_s: float = 0.0


@dataclass(frozen=True)
class Died:
    """Its process ended, or it raised what no member survives.

    Attributes:
        reason: A sentence for the user.
    """

    reason: str


@dataclass(frozen=True)
class Left:
    """It was asked to leave, and has nothing to do any more."""


Event = Started | Pulling | Pulled | Progress | Died | Left


@dataclass(frozen=True)
class Pull:
    """It is to pull the newest weights."""

    member: int


@dataclass(frozen=True)
class Probe:
    """It is to be asked how far it is."""

    member: int


@dataclass(frozen=True)
class Admit:
    """It may be given work."""

    member: int


@dataclass(frozen=True)
class Lose:
    """It is gone, or to be ended; its work goes to others.

    Attributes:
        reason: A sentence for the user.
        hung: Whether its process is still there.
        served: Whether it ever served.
    """

    member: int
    reason: str
    hung: bool
    served: bool


Action = Pull | Probe | Admit | Lose


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes:
        start_s: For a start.
        pull_s: For the first weights.
        hang_s: Without progress, while it has work.
        silent_s: Without an answer to a probe.
        probe_every_s: Between probes.
        slow_factor: A member may take so many times its slowest step for another, if that is more than
            `hang_s`.
    """

    start_s: float = 600.0
    pull_s: float = 600.0
    hang_s: float = 60.0
    silent_s: float = 60.0
    probe_every_s: float = 2.0
    slow_factor: float = 5.0


@dataclass
class _Member:
    name: str
    status: Status
    since: float
    steps: int = -1
    progress_at: float = 0.0  # when it last made a step, or had none to make
    answered_at: float = 0.0
    asked_at: float | None = None  # of the probe that is out
    allowed_s: float = 0.0
    served: bool = False

    def excuse(self, seconds: float) -> None:
        """Seconds that are not its own do not count."""
        self.since += seconds
        self.progress_at += seconds
        self.answered_at += seconds
        if self.asked_at is not None:
            self.asked_at += seconds


class FleetHealth:
    """Of all members, by their numbers. A number that was lost can join again."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._members: dict[int, _Member] = {}
        self._attention = Attention(AWAY * limits.probe_every_s)

    def status(self, member: int) -> Status:
        """Of one that has joined once."""
        return self._members[member].status

    def count(self, *statuses: Status) -> int:
        """Members of these statuses."""
        return sum(one.status in statuses for one in self._members.values())

    def join(self, member: int, name: str, now: float) -> None:
        """A member is being started; `name` is for messages."""
        self._members[member] = _Member(name, Status.STARTING, now)

    def observe(self, member: int, event: Event, now: float) -> list[Action]:
        """Takes in what was seen of a member. What is told of one that is lost or retired has no effect."""
        one = self._members[member]
        if one.status in (Status.LOST, Status.RETIRED):
            return []
        match event:
            case Started() if one.status is Status.STARTING:
                self._set(one, Status.STALE, math.inf)  # which is no fault of its own while none are there
                return [Pull(member)]
            case Pulling() if one.status is Status.STALE:
                one.since = now
            case Pulled() if one.status in (Status.STARTING, Status.STALE):
                self._set(one, Status.SERVING, now)
                one.served, one.progress_at, one.answered_at, one.asked_at = True, now, now, None
                return [Admit(member)]
            case Progress():
                self._progress(one, event, now)
            case Died():
                return [self._lose(member, event.reason, now, hung=False)]
            case Left():
                self._set(one, Status.RETIRED, now)
        return []

    def tick(self, now: float) -> list[Action]:
        """What is due by the clock alone. To be asked at least as often as probes are sent, and after all
        that members told was observed: where it was not asked for long, nobody listened, and no member is
        at fault.
        """
        actions: list[Action] = []
        if missed_s := self._attention.missed(now):
            for one in self._members.values():
                one.excuse(missed_s)
        for number, one in self._members.items():
            if one.status is Status.STARTING and now - one.since > self._limits.start_s:
                reason = f"{one.name} did not start within {self._limits.start_s:.0f} s (--start_timeout)."
                actions.append(self._lose(number, reason, now, hung=True))
            elif one.status is Status.STALE and now - one.since > self._limits.pull_s:
                reason = f"{one.name} did not pull its weights within {self._limits.pull_s:.0f} s."
                actions.append(self._lose(number, reason, now, hung=True))
            elif one.status in (Status.SERVING, Status.SUSPECT):
                actions += self._watched(number, one, now)
        return actions

    def _progress(self, one: _Member, event: Progress, now: float) -> None:
        one.answered_at, one.asked_at = now, None
        one.allowed_s = max(self._limits.hang_s, self._limits.slow_factor * event.slowest_step_s)
        if event.steps != one.steps or not event.busy:
            one.steps, one.progress_at = event.steps, now
            if one.status is Status.SUSPECT:
                self._set(one, Status.SERVING, now)

    def _watched(self, number: int, one: _Member, now: float) -> list[Action]:
        limits = self._limits
        allowed_s = max(one.allowed_s, limits.hang_s)
        still_s = one.answered_at - one.progress_at  # what was seen, not what may be under way unseen
        silent_s = 0.0 if one.asked_at is None else now - one.asked_at
        if still_s > allowed_s:
            reason = (
                f"{one.name} hangs: it has work, and its engine has made no step for {still_s:.0f} s "
                "(--hang_timeout)."
            )
            return [self._lose(number, reason, now, hung=True)]
        if silent_s > limits.silent_s:
            reason = f"{one.name} hangs: its process has not answered for {silent_s:.0f} s (--hang_timeout)."
            return [self._lose(number, reason, now, hung=True)]
        suspicious = still_s > allowed_s / 2 or silent_s > limits.silent_s / 2
        if suspicious and one.status is Status.SERVING:
            self._set(one, Status.SUSPECT, now)
        if one.asked_at is None and now - one.answered_at >= limits.probe_every_s:
            one.asked_at = now
            return [Probe(number)]
        return []

    def _lose(self, number: int, reason: str, now: float, *, hung: bool) -> Lose:
        one = self._members[number]
        self._set(one, Status.LOST, now)
        return Lose(number, reason, hung, one.served)

    def _set(self, one: _Member, status: Status, now: float) -> None:
        one.status, one.since = status, now
