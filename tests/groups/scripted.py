"""Members of a fleet that do what a script says, and a crew of them. No actors, no clock but the test's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raytune_rl.groups.fleet_core import FleetCore
from raytune_rl.groups.members import Done, GroupCall, Member, Reply
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.tickets import Burst, EngineProgress, InFlight, Outcome, Ticket, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.runtime.fleet_health import Limits

LIMITS = Limits(start_s=100, pull_s=50, hang_s=20, silent_s=10, probe_every_s=2)


def raising(error: Exception) -> Reply:
    """An answer that is an error."""

    def reply() -> Any:
        raise error

    return reply


class ScriptedMember:
    """Answers when it is told to.

    Attributes:
        held: What it was given and has not answered.
        bursts: The burst of each prompt that it was given.
        asked: Everything else, in order.
        waiting: By method, whom to tell.
    """

    def __init__(self, number: int, life: int, at_once: int) -> None:
        self.number, self.life, self.name, self.at_once = number, life, f"rollout[{number}]", at_once
        self.version: int | None = None
        self.steps = 0
        self.held: dict[Ticket, tuple[GroupCall, Done]] = {}
        self.bursts: list[Burst | None] = []
        self.asked: list[str] = []
        self.waiting: dict[str, list[tuple[Any, Done]]] = {}
        self.cancelled: list[Ticket] = []

    def _later(self, method: str, facts: Any, done: Done) -> None:
        self.asked.append(method)
        self.waiting.setdefault(method, []).append((facts, done))

    def ping(self, done: Done) -> None:
        """See `Member`."""
        self._later("ping", None, done)

    def pull(self, version: int | None, in_flight: InFlight, done: Done) -> None:
        """See `Member`."""
        self._later("pull", (version, in_flight), done)

    def progress(self, done: Done) -> None:
        """See `Member`."""
        self._later("progress", None, done)

    def ask(self, method: str, done: Done) -> None:
        """See `Member`."""
        self._later(method, None, done)

    def run_group(self, call: GroupCall, burst: Burst | None, done: Done) -> None:
        """See `Member`."""
        assert self.version is not None, "it has no weights"
        self.held[call.ticket] = (call, done)
        self.bursts.append(burst)

    def cancel(self, ticket: Ticket) -> None:
        """See `Member`."""
        self.cancelled.append(ticket)
        self.held.pop(ticket, None)

    # -- the script

    def up(self) -> None:
        """Its process is there."""
        self.answer("ping", (self.version, self.at_once))

    def pulled(self, newest: int) -> None:
        """It has what it was to pull; `newest` where it was told no number."""
        (version, _), _ = self.waiting["pull"][0]
        self.version = newest if version is None else version
        self.answer("pull", WeightUpdate(self.version, 0.5 + self.number))

    def answer(self, method: str, answer: Any) -> None:
        """Answers the first call of a method."""
        _, done = self.waiting[method].pop(0)
        done(raising(answer) if isinstance(answer, Exception) else lambda: answer)

    def tell(self, *, busy: bool = True, received: int = 0, unfinished: int = 10**6) -> None:
        """Answers probes."""
        while self.waiting.get("progress"):
            self.answer("progress", EngineProgress(self.steps, busy, 0.1, received, unfinished, self.version))

    def finish(self, *tickets: Ticket) -> None:
        """Answers prompts: these, or all that it has."""
        for ticket in tickets or tuple(self.held):
            call, done = self.held.pop(ticket)
            answer = trajectories(call, self.version or 0, self.name)
            done(lambda answer=answer: answer)  # type: ignore[misc]

    def fail(self, error: Exception) -> None:
        """All calls that are out raise this, as those of a process that died do."""
        for _, done in self.held.values():
            done(raising(error))
        for calls in self.waiting.values():
            for _, done in calls:
                done(raising(error))
        self.held.clear()
        self.waiting.clear()


class ScriptedCrew:
    """Members 0, 1, ...; a restarted one has its number and a further life."""

    def __init__(self, most: int, at_once: int = 8) -> None:
        self._most, self._at_once = most, at_once
        self.members: dict[int, ScriptedMember] = {}
        self.ended: list[int] = []

    def __len__(self) -> int:
        return self._most

    def member(self, number: int) -> Member:
        """See `Crew`."""
        life = self.members[number].life + 1 if number in self.members else 0
        self.members[number] = ScriptedMember(number, life, self._at_once)
        return self.members[number]

    def restart(self, number: int) -> Member:
        """See `Crew`."""
        return self.member(number)

    def end(self, number: int) -> None:
        """See `Crew`."""
        self.ended.append(number)

    def add(self, slot: Any) -> int:
        """See `Crew`."""
        self._most += 1
        return self._most - 1


def trajectories(call: GroupCall, version: int, where: str) -> tuple[Trajectory, ...]:
    """An answer to a prompt."""
    return tuple(
        Trajectory(
            call.request.row,
            call.request.prompt_id,
            RowPointer(where, sample),
            RowPointer(where, sample),
            EpisodeFacts(call.request.prompt_id, sample, sample, 3, 5, "stop", version),
        )
        for sample in range(len(call.request.seeds))
    )


PROMPTS = PromptSet("columns", "extra", "texts", np.full(10_000, 3), Account((), {}, None, (), None, ()))


@dataclass
class Fleet:
    """A core, its members, and what came of tickets.

    Attributes:
        outcomes: In order; errors that end the run among them.
        losses: Sentences for the user.
    """

    crew: ScriptedCrew
    limits: Limits = LIMITS
    now: float = 0.0
    outcomes: list[Outcome | Exception] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    posted: list[Callable[[FleetCore, float], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = FleetCore(self.crew, self.limits, self.posted.append, self.losses.append)
        self.tickets = 0

    @classmethod
    def serving(cls, members: int, at_once: int = 8) -> Fleet:
        """One that serves version 0."""
        from concurrent.futures import Future

        fleet = cls(ScriptedCrew(members, at_once))
        fleet.core.begin(members, 0.0)
        fleet.core.serve(0, "drain", True, Future(), 0.0)
        for member in fleet.crew.members.values():
            member.up()
        fleet.settle()
        for member in fleet.crew.members.values():
            member.pulled(0)
        fleet.settle()
        return fleet

    def __getitem__(self, number: int) -> ScriptedMember:
        return self.crew.members[number]

    def settle(self) -> None:
        """Takes in what members told."""
        while self.posted:
            self.posted.pop(0)(self.core, self.now)

    def wait(self, seconds: float, alive: Sequence[int] = ()) -> None:
        """Time passes; members that are alive answer probes, and make steps."""
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            for number in alive:
                self[number].steps += 1
                self[number].tell()
            self.settle()
            self.core.tick(self.now)
            self.settle()

    def ask(self, count: int, completions: int = 4, *, together: bool = False) -> list[Ticket]:
        """Asks prompts; row n is ticket n."""
        calls = []
        for _ in range(count):
            ticket = Ticket(self.tickets)
            request = EpisodeRequest(self.tickets, self.tickets, tuple(range(completions)))
            self.tickets += 1
            sampling = Sampling(1.0, 10)
            calls.append(
                GroupCall(ticket, request, PROMPTS, sampling, None, False, together, self.outcomes.append)
            )
        self.core.submit(calls, self.now)
        return [call.ticket for call in calls]

    def held(self) -> dict[int, list[int]]:
        """Tickets by member."""
        return {n: [t.number for t in m.held] for n, m in self.crew.members.items()}

    def ended(self) -> Counter[tuple[str, int]]:
        """How often each ticket ended, and how."""
        return Counter(
            (type(o).__name__, o.ticket.number) for o in self.outcomes if not isinstance(o, Exception)
        )
