"""Who gets which prompt: each exactly once, whatever becomes of the members."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from raytune_rl.groups.dispatch import Assignment, Dispatcher, Work


def works(count: int, sequences: int = 4, first: int = 0) -> list[Work]:
    return [Work(first + i, sequences, sequences * 100) for i in range(count)]


def filled(bounds: list[int]) -> Dispatcher:
    dispatcher = Dispatcher()
    for number, bound in enumerate(bounds):
        dispatcher.add(number, bound)
    return dispatcher


@dataclass
class Play:
    """Random events, and what must hold after each."""

    rng: np.random.Generator
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    bounds: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)
    ended: Counter[int] = field(default_factory=Counter)
    lost_by: dict[int, int] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)

    def assign(self, assigned: list[Assignment]) -> None:
        """The members get what was assigned."""
        for one in assigned:
            assert one.ticket not in self.held, "two members have it"
            assert not self.ended[one.ticket], "it has ended"
            assert one.member in self.bounds
            assert one.member not in self.retired
            others = self.bounds.keys() - self.retired - {one.member}
            assert self.lost_by.get(one.ticket) != one.member or not others
            self.held[one.ticket] = one.member

    def check(self) -> None:
        """No member has more than its bound, but for a single prompt; nothing waits that would fit."""
        for member, bound in self.bounds.items():
            mine = [t for t, m in self.held.items() if m == member]
            assert len(mine) <= 1 or sum(self.sizes[t] for t in mine) <= bound
            assert self.dispatcher.held_by(member) == len(mine)
        assert self.dispatcher.running == len(self.held)
        assert self.dispatcher.waiting == len(self.sizes) - len(self.held) - len(self.ended)
        lost_before = any(self.losses[t] for t in self.sizes if not self.ended[t])
        if self.dispatcher.waiting and not lost_before:
            free = [m for m in self.bounds.keys() - self.retired if m not in self.held.values()]
            assert not free, "work waits beside a member that has none"

    def lose(self, member: int) -> None:
        """A member is gone."""
        mine = {t for t, m in self.held.items() if m == member}
        loss = self.dispatcher.lost(member)
        assert set(loss.again) | set(loss.quarantined) == mine
        assert set(loss.quarantined) == (mine if len(mine) == 1 and self.losses[min(mine)] else set())
        for ticket in mine:
            del self.held[ticket]
            self.losses[ticket] += 1
            self.lost_by[ticket] = member
        for ticket in loss.quarantined:
            self.ended[ticket] += 1
        del self.bounds[member]
        self.retired.discard(member)

    def event(self) -> None:
        """One thing happens."""
        open_tickets = [t for t in self.sizes if not self.ended[t]]
        kind = self.rng.choice(["submit", "burst", "done", "add", "lose", "cancel", "retire", "look"])
        fresh = range(len(self.sizes), len(self.sizes) + int(self.rng.integers(1, 6)))
        if kind in ("submit", "burst"):
            new = [Work(t, int(self.rng.integers(1, 9)), 100) for t in fresh]
            self.sizes |= {w.ticket: w.sequences for w in new}
            if kind == "burst":
                self.assign(self.dispatcher.submit_burst(new))
            else:
                for work in new:
                    self.dispatcher.submit(work)
        elif kind == "done" and self.held:
            ticket = int(self.rng.choice(list(self.held)))
            self.dispatcher.done(ticket)
            del self.held[ticket]
            self.ended[ticket] += 1
        elif kind == "cancel" and open_tickets:
            ticket = int(self.rng.choice(open_tickets))
            assert self.dispatcher.cancel(ticket) == self.held.pop(ticket, None)
            self.ended[ticket] += 1
        elif kind == "add" and len(self.bounds) < 6:
            member = next(m for m in range(7) if m not in self.bounds)
            self.bounds[member] = int(self.rng.integers(4, 20))
            self.dispatcher.add(member, self.bounds[member])

        elif kind == "lose" and self.bounds:
            self.lose(int(self.rng.choice(list(self.bounds))))
        elif kind == "retire" and self.bounds:
            member = int(self.rng.choice(list(self.bounds)))
            self.dispatcher.retire(member)
            self.retired.add(member)
        elif kind == "look" and self.bounds:
            member = int(self.rng.choice(list(self.bounds)))
            mine = sum(self.sizes[t] for t, m in self.held.items() if m == member)
            self.dispatcher.observed(member, 10**6, mine)
        self.assign(self.dispatcher.assign())
        self.check()


@pytest.mark.parametrize("seed", range(40))
def test_each_ticket_ends_once_under_random_events(seed: int) -> None:
    play = Play(np.random.default_rng(seed))
    for _ in range(300):
        play.event()
    spare = 100
    play.dispatcher.add(spare, 10)
    play.bounds[spare] = 10
    for _ in range(10_000):  # and nothing is forgotten once members stay
        play.assign(play.dispatcher.assign())
        if not play.held:
            break
        for ticket in list(play.held):
            play.dispatcher.done(ticket)
            del play.held[ticket]
            play.ended[ticket] += 1
    assert play.ended == Counter(dict.fromkeys(play.sizes, 1))
    assert (play.dispatcher.running, play.dispatcher.waiting) == (0, 0)


def test_work_goes_to_who_has_room_and_the_rest_waits() -> None:
    dispatcher = filled([8, 16])
    for work in works(10):
        dispatcher.submit(work)
    assigned = dispatcher.assign()
    assert [a.ticket for a in assigned] == [0, 1, 2, 3, 4, 5], "first come, first served"
    assert Counter(a.member for a in assigned) == {0: 2, 1: 4}
    assert dispatcher.waiting == 4
    dispatcher.done(next(a.ticket for a in assigned if a.member == 0))
    assert dispatcher.assign() == [Assignment(6, 0)]


def test_half_finished_prompts_make_room() -> None:
    dispatcher = filled([8])
    for work in works(4):
        dispatcher.submit(work)
    assert len(dispatcher.assign()) == 2
    dispatcher.observed(0, received=2, unfinished=3)  # 5 of 8 sequences are finished
    assert dispatcher.assign() == [Assignment(2, 0)]
    dispatcher.observed(0, received=2, unfinished=2)  # an answer from before it got the third
    assert dispatcher.assign() == []
    dispatcher.done(0)
    dispatcher.done(1)
    assert dispatcher.assign() == [Assignment(3, 0)]


def test_a_prompt_larger_than_the_bound_goes_to_an_empty_member() -> None:
    dispatcher = filled([4])
    for work in works(2, sequences=9):
        dispatcher.submit(work)
    assert dispatcher.assign() == [Assignment(0, 0)]
    dispatcher.done(0)
    assert dispatcher.assign() == [Assignment(1, 0)]


@pytest.mark.parametrize(("count", "members"), [(8, 2), (7, 3), (2, 3), (1, 1), (10, 4)])
def test_a_burst_is_spread_as_array_split_does(count: int, members: int) -> None:
    assigned = filled([1000] * members).submit_burst(works(count))
    parts = np.array_split(np.arange(count), members)
    assert [(a.ticket, a.member) for a in assigned] == [(int(t), m) for m, p in enumerate(parts) for t in p]


def test_what_a_burst_has_too_much_waits_for_whoever_is_free() -> None:
    dispatcher = filled([8, 8])
    assigned = dispatcher.submit_burst(works(8))
    assert [(a.ticket, a.member) for a in assigned] == [(0, 0), (1, 0), (4, 1), (5, 1)]
    dispatcher.done(4)
    dispatcher.done(5)
    assert dispatcher.assign() == [Assignment(2, 1), Assignment(3, 1)]


def test_a_burst_without_members_waits() -> None:
    dispatcher = Dispatcher()
    assert dispatcher.submit_burst(works(3)) == []
    dispatcher.add(5, 100)
    assert [a.member for a in dispatcher.assign()] == [5, 5, 5]


def test_what_is_lost_goes_to_others_at_once_and_first() -> None:
    dispatcher = filled([8, 8, 8])
    for work in works(9):
        dispatcher.submit(work)
    held = {a.ticket: a.member for a in dispatcher.assign()}
    mine = tuple(t for t, m in held.items() if m == 1)
    assert dispatcher.lost(1).again == mine
    dispatcher.add(1, 8)  # it is started anew, and free; what it lost is not for it
    assert dispatcher.assign() == [Assignment(6, 1), Assignment(7, 1)]
    done = next(t for t, m in held.items() if m == 2)
    dispatcher.done(done)
    assert dispatcher.assign() == [Assignment(mine[0], 2)], "before number 8, which has waited for long"


def test_the_only_member_gets_again_what_it_lost() -> None:
    dispatcher = filled([8])
    dispatcher.submit(works(1)[0])
    dispatcher.assign()
    dispatcher.lost(0)
    assert dispatcher.assign() == []
    dispatcher.add(0, 8)
    assert dispatcher.assign() == [Assignment(0, 0)]
    assert dispatcher.lost(0).quarantined == (0,)


def killed(killers: set[int], count: int, members: int, bound: int) -> tuple[dict[int, int], int]:
    """Plays a fleet in which some prompts kill whoever takes them. Returns the members that each prompt that
    was given up had, and how many died."""
    dispatcher, deaths, given_up = filled([bound] * members), 0, {}
    for work in works(count):
        dispatcher.submit(work)
    held: dict[int, set[int]] = {m: set() for m in range(members)}
    kills: Counter[int] = Counter()
    for _ in range(1000):
        for one in dispatcher.assign():
            held[one.member].add(one.ticket)
        dying = [m for m, mine in held.items() if mine & killers]
        if dying:
            deaths += 1
            kills.update(held[dying[0]] & killers)
            loss = dispatcher.lost(dying[0])
            assert set(loss.quarantined) <= killers, "an innocent prompt was given up"
            given_up |= {t: kills[t] for t in loss.quarantined}
            held[dying[0]] = set()
            dispatcher.add(dying[0], bound)
            continue
        for mine in held.values():
            for ticket in mine:
                dispatcher.done(ticket)
            mine.clear()
        if not dispatcher.running and not dispatcher.waiting:
            break
    assert (dispatcher.running, dispatcher.waiting) == (0, 0)
    return given_up, deaths


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("bound", [4, 40])
def test_a_prompt_that_kills_is_found_among_the_innocent(members: int, bound: int) -> None:
    given_up, deaths = killed({7}, 20, members, bound)
    assert given_up.keys() == {7}
    assert given_up[7] == (2 if bound == 4 else given_up[7])
    assert deaths <= 3
    given_up, deaths = killed({3, 7, 8}, 20, members, bound)
    assert given_up.keys() == {3, 7, 8}
    assert deaths <= 9


def test_a_member_that_was_taken_away_accuses_nobody() -> None:
    dispatcher = filled([8, 8])
    dispatcher.submit(works(1)[0])
    for _ in range(5):
        (one,) = dispatcher.assign()
        loss = dispatcher.lost(one.member, blame=False)
        assert loss.again == (0,)
        assert loss.quarantined == ()
        dispatcher.add(one.member, 8)


def test_a_retired_member_keeps_what_it_has_and_gets_no_more() -> None:
    dispatcher = filled([8, 8])
    for work in works(2):
        dispatcher.submit(work)
    dispatcher.assign()
    dispatcher.retire(0)
    assert dispatcher.members == [1]
    for work in works(2, first=2):
        dispatcher.submit(work)
    assert [a.member for a in dispatcher.assign()] == [1]
    dispatcher.done(0)
    assert dispatcher.assign() == []
    dispatcher.reopen(0)
    assert [a.member for a in dispatcher.assign()] == [0]


def test_a_cancelled_prompt_makes_room() -> None:
    dispatcher = filled([8])
    for work in works(4):
        dispatcher.submit(work)
    dispatcher.assign()
    assert dispatcher.cancel(3) is None
    assert dispatcher.cancel(0) == 0
    assert dispatcher.assign() == [Assignment(2, 0)]
    with pytest.raises(KeyError):
        dispatcher.cancel(0)


def events_of(members: int, prompts: int) -> int:
    """Steps that Python takes for each prompt in a fleet that is always full: a count, no clock."""
    import sys

    dispatcher = filled([64] * members)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += 1

    for work in works(2 * 16 * members):
        dispatcher.submit(work)
    held = [a.ticket for a in dispatcher.assign()]
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for number in range(prompts):
            dispatcher.done(held[number])
            dispatcher.submit(Work(10**9 + number, 4, 400))
            held += [a.ticket for a in dispatcher.assign()]
    finally:
        sys.setprofile(before)
    return calls // prompts


def test_a_prompt_costs_the_same_among_ten_members_and_a_thousand() -> None:
    assert events_of(1000, 300) <= 1.5 * events_of(10, 100)


def test_what_cannot_wait_goes_to_each_member_however_much_it_has() -> None:
    dispatcher = filled([4, 4])
    for work in works(4):
        dispatcher.submit(work)
    assert len(dispatcher.assign()) == 2
    assert dispatcher.submit_burst(works(2, first=4)) == [], "they are full"
    probes = [Work(number, 4, 400, at_once=True) for number in (6, 7)]
    assert dispatcher.submit_burst(probes) == [Assignment(6, 0), Assignment(7, 1)]
    assert dispatcher.waiting == 4
    for number in (6, 7):
        dispatcher.done(number)
    assert dispatcher.assign() == [], "they are as full as before"
