"""The fleet's decisions: what is sent to whom, who is lost and started anew, whose work is done again.

One thread calls it, with the clock's reading at each call; it waits for nothing. Members answer through
`post`, which hands what is to be done to that thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from raytune_rl.errors import RaytuneError, WorkerDiedError
from raytune_rl.groups.dispatch import Dispatcher
from raytune_rl.groups.elastic import Elastic
from raytune_rl.groups.fleet_prompts import FleetPrompts, Given
from raytune_rl.groups.fleet_rounds import Round, Rounds
from raytune_rl.groups.members import Crew, GroupCall, Member, Reply
from raytune_rl.groups.scaling import Demand
from raytune_rl.protocol.tickets import (
    Burst,
    EngineProgress,
    Finished,
    FleetLoad,
    InFlight,
    ServeReport,
    Ticket,
    WeightUpdate,
)
from raytune_rl.runtime.fleet_health import (
    Action,
    Admit,
    Died,
    Event,
    FleetHealth,
    Left,
    Limits,
    Lose,
    Probe,
    Progress,
    Pull,
    Pulled,
    Pulling,
    Started,
    Status,
)
from raytune_rl.runtime.placement import Slot

ATTEMPTS = 3
"""Starts in a row of a member that never served, and prompts in a row that no member survived, after which
the fault is neither's."""

UP = (Status.SERVING, Status.SUSPECT, Status.STALE)
FORGET_WEIGHTS = {"sleep", "wake"}
"""Methods after which an engine has no weights."""

Post = Callable[[Callable[["FleetCore", float], None]], None]


@dataclass
class _Hand:
    """A member with what is known of it; another one after each restart."""

    member: Member
    failed_starts: int = 0
    bound: int = 0
    version: int | None = None  # that it serves, as far as known
    idle_since: float | None = None


class FleetCore:
    """The state of a fleet.

    Args:
        crew: Where members come from.
        limits: Of their health.
        post: Hands a function to the thread that calls this object; members answer in threads of their own.
        lost: Told a sentence at each loss.

    Attributes:
        elastic: Keeps the fleet's size, where members come and go. None: who is lost is started anew in its
            place, and nobody else comes.
    """

    elastic: Elastic | None = None

    def __init__(self, crew: Crew, limits: Limits, post: Post, lost: Callable[[str], None]) -> None:
        self._crew, self._post, self._lost = crew, post, lost
        self._dispatcher, self._health = Dispatcher(), FleetHealth(limits)
        self._prompts, self._rounds = FleetPrompts(self._dispatcher), Rounds()
        self._hands: dict[int, _Hand] = {}
        self._version: int | None = None
        self._idle_s = 0.0
        self._admitted = 0
        self._broken: Exception | None = None

    # -- what the controller asks for

    def begin(self, members: int, now: float) -> None:
        """Takes on members that are started already, or are being started."""
        for number in range(members):
            self._join(number, self._crew.member(number), 0, now)

    def submit(self, calls: Sequence[GroupCall], now: float) -> None:
        """Prompts that are to be answered; those that belong together are spread evenly."""
        if self._broken is not None:
            for call in calls:
                call.outlet(self._broken)
            return
        self._send(self._prompts.submit(calls, now), now)

    def cancel(self, ticket: Ticket, reason: str, now: float) -> None:
        """Nobody wants a prompt any more; nothing, if it has ended."""
        member = self._prompts.cancel(ticket, reason)
        if member is not None:
            self._hands[member].member.cancel(ticket)
        self._dispatch(now)

    def serve(
        self, version: int, in_flight: InFlight, every: bool, done: Future[ServeReport], now: float
    ) -> None:
        """All members serve a version; who does already is not asked. `every`: those that are being started
        are waited for, too, unless members come and go: then a new one costs the others no time. They are
        in any case where nobody serves.
        """
        if self._broken is not None:
            done.set_exception(self._broken)
            return
        self._version = version
        up = [n for n in self._hands if self._status(n) in UP]
        behind = [n for n in up if self._hands[n].version != version]
        starting = [n for n in self._hands if self._status(n) is Status.STARTING]
        patient = not up or (every and self.elastic is None)
        owed = {*behind, *(starting if patient else ())}
        call = Round(owed, done, lambda updates: ServeReport.of(version, updates), patient=patient)
        self._rounds.begin(call)
        for number in behind:
            self._pull(number, version, in_flight, now, call)

    def ask(self, method: str, done: Future[list[Any]], now: float) -> None:
        """Calls a method of every member; of one that is being started, once it is."""
        if self._broken is not None:
            done.set_exception(self._broken)
            return
        there = [n for n in self._hands if self._status(n) is not Status.RETIRED]
        call = Round(set(there), done, list)
        self._rounds.begin(call)
        for number in there:
            if method in FORGET_WEIGHTS:
                self._hands[number].version = None

            def take(reply: Reply, at: float, number: int = number) -> None:
                self._with(number, reply, at, lambda answer: call.take(number, answer or True))

            self._hands[number].member.ask(method, self._answer(number, take))

    def resize(self, members: int, now: float) -> None:
        """As many members, of those that there can be. Who is too many finishes what it has."""
        if self.elastic is not None:
            self.elastic.policy.resize(members, now)
            return
        for number in range(len(self._crew)):
            alive = number in self._hands and self._status(number) is not Status.RETIRED
            if number < members and not alive:
                failed = self._hands[number].failed_starts if number in self._hands else 0
                self._join(number, self._crew.restart(number), failed, now)
            elif number < members:
                self._dispatcher.reopen(number)
            elif alive:
                self._dispatcher.retire(number)
                self._leave_if_done(number, now)
        self._dispatch(now)

    def load(self, now: float) -> FleetLoad:
        """What the fleet is doing."""
        idle_s = self._idle_s + sum(
            now - hand.idle_since for hand in self._hands.values() if hand.idle_since is not None
        )
        return FleetLoad(
            self._health.count(Status.SERVING, Status.SUSPECT),
            self._health.count(Status.STARTING, Status.STALE),
            self._dispatcher.running,
            self._dispatcher.waiting,
            idle_s,
            self._prompts.waited_s(now),
            **({} if self.elastic is None else self.elastic.told()),
            admitted=self._admitted,
        )

    def tick(self, now: float) -> None:
        """What is due by the clock."""
        if self._broken is None:
            self._do(self._health.tick(now), now)
        if self._broken is None and self.elastic is not None:
            self.elastic.look(now)

    # -- who comes and goes: see `elastic.Fleet`

    def demand(self, now: float) -> Demand:
        """What there is to do."""
        load = self.load(now)
        busy = sum(self._dispatcher.held_by(number) > 0 for number in self._hands)
        return Demand(busy, load.running, load.waiting, load.waiting_s)

    def start_member(self, slot: Slot, now: float) -> int:
        """One more, on a place of its own; its number."""
        number = self._crew.add(slot)
        self._join(number, self._crew.member(number), 0, now)
        return number

    def idle_members(self) -> list[int]:
        """Those that serve and have nothing to do."""
        return [number for number in self._dispatcher.members if not self._dispatcher.held_by(number)]

    def dismiss(self, number: int, now: float) -> None:
        """Ends a member; others get what it had, before all that waits."""
        self._note_idle(number, now, idle=False)
        self._dispatcher.lost(number, blame=False)
        self._observe(number, Left(), now)
        self._gone(number)
        self._dispatch(now)

    def _gone(self, number: int) -> None:
        """Nobody has this number any more."""
        self._crew.end(number)
        del self._hands[number]
        self._rounds.lost(number, for_good=True)

    # -- what members tell

    def _answer(self, number: int, take: Callable[[Reply, float], None]) -> Callable[[Reply], None]:
        """For a member's `done`: what it answers is taken by the fleet's thread, unless it was replaced."""
        hand = self._hands[number]

        def done(reply: Reply) -> None:
            def later(core: FleetCore, now: float) -> None:
                if core._hands.get(number) is hand and core._broken is None:
                    take(reply, now)

            self._post(later)

        return done

    def _with(self, number: int, reply: Reply, now: float, use: Callable[[Any], None]) -> None:
        """Uses an answer; a member that did not live to give it is lost, what else it raised ends the run."""
        try:
            answer = reply()
        except WorkerDiedError as error:
            self._observe(number, Died(str(error).partition("\n")[0]), now)
        except Exception as error:  # noqa: BLE001, whoever waits for the fleet gets it
            self.fail(error)
        else:
            use(answer)

    def _join(self, number: int, member: Member, failed_starts: int, now: float) -> None:
        self._hands[number] = _Hand(member, failed_starts)
        self._health.join(number, member.name, now)

        def up(reply: Reply, at: float) -> None:
            self._with(number, reply, at, lambda facts: self._up(number, facts, at))

        member.ping(self._answer(number, up))

    def _up(self, number: int, facts: tuple[int | None, int], now: float) -> None:
        version, at_once = facts
        # A little more than it computes at once, so that it never waits for the next.
        self._hands[number].bound = at_once + max(at_once // 8, 8)
        if version is not None and self._version in (None, version):
            self._hands[number].version = version
            self._observe(number, Started(), now, pull=False)
            self._observe(number, Pulled(), now)
            self._rounds.arrived(number, None, None)
            return
        self._observe(number, Started(), now)

    def _pull(
        self,
        number: int,
        version: int | None,
        in_flight: InFlight,
        now: float,
        call: Round | None = None,
    ) -> None:
        self._observe(number, Pulling(), now)

        def pulled(reply: Reply, at: float) -> None:
            self._with(number, reply, at, lambda update: self._pulled(number, update, call, at))

        self._hands[number].member.pull(version, in_flight, self._answer(number, pulled))

    def _pulled(self, number: int, update: WeightUpdate, call: Round | None, now: float) -> None:
        assert self._version is not None
        if update.version < self._version and call is None:  # there are newer ones meanwhile
            self._pull(number, None, "drain", now)
            return
        self._hands[number].version = update.version
        self._observe(number, Pulled(), now)
        self._rounds.arrived(number, update, call)

    # -- what follows

    def _status(self, number: int) -> Status:
        return self._health.status(number)

    def _observe(self, number: int, event: Event, now: float, *, pull: bool = True) -> None:
        actions = self._health.observe(number, event, now)
        self._do([a for a in actions if pull or not isinstance(a, Pull)], now)

    def _do(self, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            number = action.member
            match action:
                case Pull():
                    if self._version is not None:  # else the first `serve` sees to it
                        self._pull(number, None, "drain", now)
                case Admit():
                    hand = self._hands[number]
                    hand.failed_starts, hand.idle_since = 0, now
                    self._admitted += 1
                    self._dispatcher.add(number, hand.bound)
                    if self.elastic is not None:
                        self.elastic.served(number, now)
                    self._dispatch(now)
                case Probe():
                    self._probe(number, now)
                case Lose():
                    self._lose(action, now)

    def _probe(self, number: int, now: float) -> None:
        if not self._dispatcher.held_by(number):  # whatever it does, nobody waits for it
            self._observe(number, Progress(0, busy=False), now)
            return

        def told(reply: Reply, at: float) -> None:
            self._with(number, reply, at, lambda progress: self._told(number, progress, at))

        self._hands[number].member.progress(self._answer(number, told))

    def _told(self, number: int, progress: EngineProgress, now: float) -> None:
        self._observe(number, Progress(progress.steps, progress.busy, progress.slowest_step_s), now)
        self._dispatcher.observed(number, progress.received, progress.unfinished)
        self._dispatch(now)

    def _lose(self, lost: Lose, now: float) -> None:
        number, hand = lost.member, self._hands[lost.member]
        self._note_idle(number, now, idle=False)
        loss = self._dispatcher.lost(number)
        then = "It is started anew" if self.elastic is None else "Another is asked for"
        self._lost(f"{lost.reason.rstrip('.')}. {then}, and its work is done again.")
        self._prompts.give_up(loss.quarantined, lost.reason)
        if self._prompts.fruitless >= ATTEMPTS:
            self.fail(WorkerDiedError(f"{lost.reason}\nNo engine survived {ATTEMPTS} prompts in a row."))
            return
        if self.elastic is not None:
            self._gone(number)
            self.elastic.lost(number)
            self._dispatch(now)
            return
        failed_starts = 0 if lost.served else hand.failed_starts + 1
        if failed_starts == ATTEMPTS:
            self.fail(WorkerDiedError(f"{lost.reason}\nIt was lost {ATTEMPTS} times before it served."))
            return
        self._join(number, self._crew.restart(number), failed_starts, now)
        self._rounds.lost(number, for_good=False)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        self._send(self._prompts.assign(), now)

    def _send(self, prompts: Sequence[Given], now: float) -> None:
        for given in prompts:
            self._note_idle(given.member, now, idle=False)
            self._run(given.member, given.call, given.burst)

    def _run(self, number: int, call: GroupCall, burst: Burst | None) -> None:
        def answered(reply: Reply, at: float) -> None:
            if self._prompts.is_with(number, call):
                self._answered(number, call, reply, at)

        self._hands[number].member.run_group(call, burst, self._answer(number, answered))

    def _answered(self, number: int, call: GroupCall, reply: Reply, now: float) -> None:
        outcome: Finished | Exception
        try:
            outcome = Finished(call.ticket, reply())
        except WorkerDiedError as error:
            self._observe(number, Died(str(error).partition("\n")[0]), now)
            return
        except RaytuneError as error:
            outcome = error
        self._prompts.ended(call, outcome)
        if not self._dispatcher.held_by(number):
            self._note_idle(number, now, idle=True)
            self._leave_if_done(number, now)
        self._dispatch(now)

    def _leave_if_done(self, number: int, now: float) -> None:
        """A member that takes no more work, and has none, goes."""
        serving = self._status(number) in (Status.SERVING, Status.SUSPECT)
        if number in self._dispatcher.members or self._dispatcher.held_by(number) or not serving:
            return
        self._note_idle(number, now, idle=False)
        self._observe(number, Left(), now)
        self._dispatcher.lost(number, blame=False)
        self._crew.end(number)

    def _note_idle(self, number: int, now: float, *, idle: bool) -> None:
        hand = self._hands[number]
        if hand.idle_since is not None:
            self._idle_s += now - hand.idle_since
        hand.idle_since = now if idle else None

    def fail(self, error: Exception) -> None:
        """The fleet cannot go on: whoever waits for it is told."""
        self._broken = error
        self._prompts.fail(error)
        self._rounds.fail(error)
