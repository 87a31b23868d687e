"""The prompts that a fleet was asked: when, who has which, and who is told how it ended."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from raytune_rl.groups.dispatch import Assignment, Dispatcher, Work
from raytune_rl.groups.members import GroupCall
from raytune_rl.protocol.tickets import Burst, Cancelled, Failed, Finished, Ticket


@dataclass(frozen=True, slots=True)
class Given:
    """A prompt that a member gets now.

    Attributes:
        member: Its number.
        call: The prompt.
        burst: What it begins together with; None: it begins when it arrives.
    """

    member: int
    call: GroupCall
    burst: Burst | None


class FleetPrompts:
    """All prompts that have not ended.

    Args:
        dispatcher: Says who gets which.

    Attributes:
        fruitless: Prompts in a row that no member survived.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._calls: dict[int, GroupCall] = {}
        self._since: dict[int, float] = {}
        self._bursts = itertools.count()
        self.fruitless = 0

    def submit(self, calls: Sequence[GroupCall], now: float) -> list[Given]:
        """Prompts that are to be answered; those that belong together are spread evenly."""
        works = [_work(call) for call in calls]
        for call in calls:
            self._calls[call.ticket.number] = call
            self._since[call.ticket.number] = now
        if calls[0].together:
            return self._given(self._dispatcher.submit_burst(works))
        for work in works:
            self._dispatcher.submit(work)
        return self.assign()

    def assign(self) -> list[Given]:
        """All that can go to a member now."""
        return self._given(self._dispatcher.assign())

    def waited_s(self, now: float) -> float:
        """Seconds that the first of those that nobody holds has waited."""
        first = self._dispatcher.first_waiting()
        return 0.0 if first is None else now - self._since.get(first, now)

    def is_with(self, member: int, call: GroupCall) -> bool:
        """Whether a prompt has not ended, and a member has it."""
        ticket = call.ticket.number
        return self._calls.get(ticket) is call and self._dispatcher.holder(ticket) == member

    def ended(self, call: GroupCall, outcome: Finished | Exception) -> None:
        """A member has answered; an exception ends the run."""
        self.fruitless = 0
        self._forget(call.ticket.number)
        self._dispatcher.done(call.ticket.number)
        call.outlet(outcome)

    def cancel(self, ticket: Ticket, reason: str) -> int | None:
        """Nobody wants a prompt any more; nothing, if it has ended. The member that has it."""
        if ticket.number not in self._calls:
            return None
        call = self._forget(ticket.number)
        member = self._dispatcher.cancel(ticket.number)
        call.outlet(Cancelled(ticket, reason))
        return member

    def give_up(self, tickets: Sequence[int], reason: str) -> None:
        """No member survives these."""
        for ticket in tickets:
            self.fruitless += 1
            call = self._forget(ticket)
            sentence = (
                f"prompt {call.request.row} is given up: its engine was lost each time that it was asked"
            )
            call.outlet(Failed(call.ticket, f"{sentence}. {reason}"))

    def fail(self, error: Exception) -> None:
        """None will be answered; whoever waits is told once."""
        for outlet in {id(call.outlet): call.outlet for call in self._calls.values()}.values():
            outlet(error)
        self._calls.clear()
        self._since.clear()

    def _forget(self, ticket: int) -> GroupCall:
        self._since.pop(ticket, None)
        return self._calls.pop(ticket)

    def _given(self, assigned: Sequence[Assignment]) -> list[Given]:
        """Those that one member gets now, and that belong together, begin in one step."""
        given = []
        together: defaultdict[int, list[GroupCall]] = defaultdict(list)
        for one in assigned:
            call = self._calls[one.ticket]
            if call.together:
                together[one.member].append(call)
            else:
                given.append(Given(one.member, call, None))
        for member, calls in together.items():
            name = f"burst {next(self._bursts)}"
            given += [Given(member, call, Burst(name, len(calls), index)) for index, call in enumerate(calls)]
        return given


def _work(call: GroupCall) -> Work:
    sequences = len(call.request.seeds)
    prompt = int(call.prompts.lengths[call.request.row])
    tokens = sequences * (prompt + call.sampling.max_tokens)
    return Work(call.ticket.number, sequences, tokens, call.at_once)
