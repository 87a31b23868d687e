"""Which engine gets which prompt. Pure: it knows of numbers only, and answers events with assignments.

Prompts wait in one queue, first come, first served, and the first goes to the member with the most room. A
member holds no more than its bound, so that what comes late can go to whoever is free then. All completions
of a prompt go to one member, whose prefix cache holds the prompt once.

A lost member's prompts are asked again at once, before all others, and of others. Any of them may have been
what killed it. One that was lost twice has its next member to itself, so that guilt is certain: a prompt that
was lost before, and was alone with a member that is lost now, is quarantined. A prompt that kills whatever
takes it so costs two members, or three where others were lost with it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

SUSPECT = 2
"""Losses from which on a prompt has a member to itself."""


@dataclass(frozen=True, slots=True)
class Work:
    """A prompt that is to be answered.

    Attributes:
        ticket: Its number.
        sequences: Completions.
        tokens: Expected in all of them, prompts included.
        at_once: A member takes it however much it has.
    """

    ticket: int
    sequences: int
    tokens: int
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """A prompt that goes to a member now."""

    ticket: int
    member: int


@dataclass(frozen=True)
class Loss:
    """The tickets that a lost member had: asked again, or given up as what kills members."""

    again: tuple[int, ...]
    quarantined: tuple[int, ...]


@dataclass(slots=True)
class _Entry:
    work: Work
    losses: int = 0
    lost_by: int | None = None
    member: int | None = None

    @property
    def order(self) -> int:
        return self.work.ticket


@dataclass
class _Member:
    bound: int
    open: bool = True
    received: int = 0
    held: dict[int, tuple[_Entry, int]] = field(default_factory=dict)  # with the number of its receipt
    most: int = 0  # sequences of all that it holds, finished ones of unfinished prompts included
    sequences: int = 0  # the same, as far as known without those that are finished
    tokens: int = 0
    apart: bool = False  # whether what it holds is to be alone with it
    stamp: int = 0


class Dispatcher:
    """The queue, and who holds what. Events are methods; `assign` says what goes where after them."""

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._entries: dict[int, _Entry] = {}
        self._queue: deque[_Entry] = deque()
        self._again: list[_Entry] = []
        # Keys of members with their stamps: an entry with an old stamp is void.
        self._room: list[tuple[bool, int, int, int, int]] = []
        self._stamps = 0
        self._waiting = 0
        self._kept_free: int | None = None  # gets nothing until it can take one that is to be alone

    @property
    def members(self) -> list[int]:
        """Members that take work, in the order of their numbers."""
        return sorted(number for number, member in self._members.items() if member.open)

    @property
    def waiting(self) -> int:
        """Prompts that nobody holds."""
        return self._waiting

    @property
    def running(self) -> int:
        """Prompts that members hold."""
        return len(self._entries) - self._waiting

    def first_waiting(self) -> int | None:
        """The ticket that waits and is the next to be assigned."""
        while self._queue and self._is_void(self._queue[0]):
            self._queue.popleft()
        waiting = [
            e for e in (*self._again, *([self._queue[0]] if self._queue else [])) if not self._is_void(e)
        ]
        return waiting[0].work.ticket if waiting else None

    def held_by(self, member: int) -> int:
        """Prompts that a member holds."""
        return len(self._members[member].held) if member in self._members else 0

    def holder(self, ticket: int) -> int | None:
        """The member that has a ticket; None: it waits, or is no ticket any more."""
        entry = self._entries.get(ticket)
        return None if entry is None else entry.member

    # -- events

    def add(self, member: int, bound: int) -> None:
        """A member serves from now on, and takes up to `bound` sequences (one prompt in any case)."""
        if member in self._members:
            raise ValueError(f"member {member} is there already")
        self._members[member] = _Member(bound)
        self._touch(member)

    def retire(self, member: int) -> None:
        """A member takes no more work; it keeps what it has."""
        if member in self._members:
            self._members[member].open = False

    def reopen(self, member: int) -> None:
        """A member that was retired takes work again."""
        if member in self._members:
            self._members[member].open = True
            self._touch(member)

    def lost(self, member: int, *, blame: bool = True) -> Loss:
        """A member is gone. What it had is asked again, before all that waits.

        Args:
            member: Which.
            blame: Whether what it held may have been the cause; not where it was taken away.
        """
        gone = self._members.pop(member, None)
        if self._kept_free == member:
            self._kept_free = None
        if gone is None:
            return Loss((), ())
        held = [entry for entry, _ in gone.held.values()]
        guilty = held if blame and len(held) == 1 and held[0].losses else []
        again = sorted((e for e in held if e not in guilty), key=lambda e: e.order)
        for entry in guilty:
            del self._entries[entry.work.ticket]
        for entry in again:
            entry.losses += blame
            entry.lost_by, entry.member = member, None
        self._waiting += len(again)
        self._again = sorted((*self._again, *again), key=lambda e: e.order)
        return Loss(tuple(e.work.ticket for e in again), tuple(e.work.ticket for e in guilty))

    def submit(self, work: Work) -> None:
        """A prompt is to be answered."""
        self._queue.append(self._enter(work))
        self._waiting += 1

    def submit_burst(self, works: Sequence[Work]) -> list[Assignment]:
        """Prompts that are to be answered at once: spread evenly, neighbours together, the same way each
        time. What does not fit a member's bound waits as any other prompt.

        Returns:
            What goes where at once, in the order of `works`.
        """
        members, assigned = self.members, []
        each, more = divmod(len(works), len(members)) if members else (0, 0)
        start = 0
        for place, number in enumerate(members):
            end = start + each + (place < more)
            for work in works[start:end]:
                entry = self._enter(work)
                if self._fits(self._members[number], entry):
                    self._hold(number, entry)
                    assigned.append(Assignment(work.ticket, number))
                else:
                    self._queue.append(entry)
                    self._waiting += 1
            start = end
        for work in works[start:]:
            self.submit(work)
        return assigned

    def done(self, ticket: int) -> None:
        """A prompt is answered, or failed for good."""
        self._release(self._entries.pop(ticket))

    def cancel(self, ticket: int) -> int | None:
        """Nobody wants a prompt any more. Returns the member that has it.

        Raises:
            KeyError: It is no ticket any more.
        """
        entry = self._entries.pop(ticket)
        member = entry.member
        self._release(entry)
        return member

    def observed(self, member: int, received: int, unfinished: int) -> None:
        """A member told how many prompts it received so far and how many of their sequences it still owes:
        those of half-finished prompts make room.
        """
        one = self._members.get(member)
        if one is None:
            return
        later = sum(entry.work.sequences for entry, number in one.held.values() if number >= received)
        one.sequences = min(one.most, unfinished + later)
        self._touch(member)

    def assign(self) -> list[Assignment]:
        """Everything that can go to a member now, in order."""
        assigned = []
        left = []
        self._keep_free(None)
        for entry in self._again:
            if self._is_void(entry):
                continue
            member = self._place_for_lost(entry)
            if member is None:
                left.append(entry)
                continue
            assigned.append(self._give(member, entry))
        self._again = left
        while self._queue:
            entry = self._queue[0]
            if self._is_void(entry):
                self._queue.popleft()
                continue
            roomiest = self._roomiest()
            if roomiest is None or not self._fits(self._members[roomiest], entry):
                break
            self._queue.popleft()
            assigned.append(self._give(roomiest, entry))
        return assigned

    # -- inside

    def _is_void(self, entry: _Entry) -> bool:
        return self._entries.get(entry.work.ticket) is not entry

    def _enter(self, work: Work) -> _Entry:
        if work.ticket in self._entries:
            raise ValueError(f"ticket {work.ticket} is there already")
        entry = self._entries[work.ticket] = _Entry(work)
        return entry

    def _fits(self, member: _Member, entry: _Entry) -> bool:
        if member.apart:
            return False
        work = entry.work
        return work.at_once or not member.held or member.sequences + work.sequences <= member.bound

    def _place_for_lost(self, entry: _Entry) -> int | None:
        """A member for a prompt that was lost: not the one that lost it, unless there is no other."""
        candidates = self.members
        others = [number for number in candidates if number != entry.lost_by] or candidates
        if entry.losses < SUSPECT:
            others = [n for n in others if n != self._kept_free and self._fits(self._members[n], entry)]
            return min(others, key=self._key, default=None)
        if self._kept_free in others:
            others = [self._kept_free]
        best = min(others, key=lambda n: (len(self._members[n].held), n), default=None)
        if best is not None and self._members[best].held:
            self._keep_free(best)
            return None
        return best

    def _keep_free(self, number: int | None) -> None:
        """From now on this member gets nothing until it has nothing; None: nobody waits for that any more."""
        before, self._kept_free = self._kept_free, number
        if before is not None and before != number:
            self._touch(before)

    def _roomiest(self) -> int | None:
        while self._room:
            *_, number, stamp = self._room[0]
            member = self._members.get(number)
            takes = member is not None and member.open and not member.apart and number != self._kept_free
            if member is not None and takes and member.stamp == stamp:
                return number
            heapq.heappop(self._room)
        return None

    def _give(self, member: int, entry: _Entry) -> Assignment:
        self._waiting -= 1
        self._hold(member, entry)
        return Assignment(entry.work.ticket, member)

    def _hold(self, number: int, entry: _Entry) -> None:
        member = self._members[number]
        entry.member = number
        member.held[entry.work.ticket] = (entry, member.received)
        member.received += 1
        member.most += entry.work.sequences
        member.sequences += entry.work.sequences
        member.tokens += entry.work.tokens
        member.apart = entry.losses >= SUSPECT
        self._touch(number)

    def _release(self, entry: _Entry) -> None:
        """Takes an entry that is no ticket any more from wherever it is."""
        if entry.member is None:
            self._waiting -= 1
            return
        member = self._members[entry.member]
        del member.held[entry.work.ticket]
        member.most -= entry.work.sequences
        member.sequences = min(member.sequences, member.most)
        member.tokens -= entry.work.tokens
        member.apart = False
        self._touch(entry.member)

    def _key(self, number: int) -> tuple[bool, int, int, int]:
        """Smallest for the one with the most room: one that has nothing before all others."""
        member = self._members[number]
        return (bool(member.held), member.sequences - member.bound, member.tokens, number)

    def _touch(self, number: int) -> None:
        member = self._members[number]
        if not member.open:
            return
        self._stamps += 1
        member.stamp = self._stamps
        heapq.heappush(self._room, (*self._key(number), self._stamps))
        if len(self._room) > 64 + 4 * len(self._members):  # mostly void
            open_members = ((n, m) for n, m in self._members.items() if m.open)
            self._room = [(*self._key(n), m.stamp) for n, m in open_members]
            heapq.heapify(self._room)
