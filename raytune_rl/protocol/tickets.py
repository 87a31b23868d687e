"""A prompt's way through the rollout fleet: a ticket when it is asked, and one outcome at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raytune_rl.protocol.trajectory import Trajectory

InFlight = Literal["drain", "keep", "recompute", "abort"]
"""What becomes of half-written answers when new weights arrive: they are finished first, go on with their
key-value cache, go on with one that the new weights compute anew, or are thrown away and asked again."""


@dataclass(frozen=True, order=True, slots=True)
class Ticket:
    """One prompt that was asked, with all of its completions. Numbers rise in the order of asking."""

    number: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All completions of a prompt are there, in the order of its seeds."""

    ticket: Ticket
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class Failed:
    """A prompt that could not be answered.

    Attributes:
        reason: A sentence for the user.
    """

    ticket: Ticket
    reason: str


@dataclass(frozen=True)
class Cancelled:
    """A prompt that nobody wants any more."""

    ticket: Ticket
    reason: str


Outcome = Finished | Failed | Cancelled


@dataclass(frozen=True, slots=True)
class Burst:
    """Prompts that one engine begins in the same step.

    Attributes:
        name: Of its own for each burst of an engine.
        size: Prompts of it.
        index: Of this one.
    """

    name: str
    size: int
    index: int


@dataclass(frozen=True)
class WeightUpdate:
    """New weights in one engine.

    Attributes:
        version: Now served.
        seconds: Until it was.
        kept, recomputed, aborted: Completions that were half written then, by what became of them.
    """

    version: int
    seconds: float
    kept: int = 0
    recomputed: int = 0
    aborted: int = 0


@dataclass(frozen=True)
class ServeReport:
    """New weights in the whole fleet.

    Attributes:
        version: Served from now on.
        members: That pulled it.
        seconds: Of the slowest.
        kept, recomputed, aborted: Completions that were half written then, by what became of them.
    """

    version: int
    members: int
    seconds: float
    kept: int = 0
    recomputed: int = 0
    aborted: int = 0

    @classmethod
    def of(cls, version: int, updates: Sequence[WeightUpdate]) -> ServeReport:
        """Of all members together."""
        return cls(
            version,
            len(updates),
            max((u.seconds for u in updates), default=0.0),
            sum(u.kept for u in updates),
            sum(u.recomputed for u in updates),
            sum(u.aborted for u in updates),
        )


@dataclass(frozen=True)
class EngineProgress:
    """How far an engine is, told without disturbing it.

    Attributes:
        steps: Of the engine since it was started.
        busy: Whether it is at one. One that stays busy and makes no step hangs, or is very slow.
        slowest_step_s: The longest step so far, seconds.
        received: Groups that it was given since its start.
        unfinished: Completions that it still owes.
        version: The weights that it serves; None: none yet.
    """

    steps: int
    busy: bool
    slowest_step_s: float
    received: int
    unfinished: int
    version: int | None


@dataclass(frozen=True)
class FleetLoad:
    """What the fleet is doing.

    Attributes:
        members: Serving now.
        starting: Not serving yet: being started, or without weights.
        running: Prompts that members have.
        waiting: Prompts that no member has room for.
        idle_s: Seconds that serving members had nothing to do, all together, since the fleet was started.
        waiting_s: Seconds that the first of the waiting prompts has waited.
        unplaced: Members that were asked for and have no place yet, where members come and go.
        joined, left, lost: Members that came to serve, that went because nothing was to do or their node was
            to leave, and that were lost, since the start.
        admitted: How often a member came to serve, whether new or started anew, since the start.
    """

    members: int
    starting: int
    running: int
    waiting: int
    idle_s: float
    waiting_s: float
    unplaced: int = 0
    joined: int = 0
    left: int = 0
    lost: int = 0
    admitted: int = 0
