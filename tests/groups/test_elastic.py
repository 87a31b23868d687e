"""A fleet that grows and shrinks, against a scripted cluster and a told clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from raytune_rl.errors import WorkerDiedError
from raytune_rl.groups.elastic import Cluster, Elastic
from raytune_rl.groups.scaling import Bounds, Demand, Patience, ScalingPolicy
from raytune_rl.runtime.placement import Node, Slot


@dataclass
class FakePlace:
    """A place that is there when its cluster says so."""

    cluster: FakeCluster
    node_id: str | None = None
    gone: bool = False

    def slot(self) -> Slot | None:
        if self.node_id is None:
            self.node_id = self.cluster.take()
        return None if self.node_id is None else Slot(self, 0, Node("10.0.0.1", self.node_id))

    def give_back(self) -> None:
        assert not self.gone, "given back twice"
        self.gone = True
        self.cluster.places.remove(self)
        if self.node_id is not None:
            self.cluster.free.append(self.node_id)


@dataclass
class FakeCluster:
    """Free places by node, and nodes that leave."""

    free: list[str] = field(default_factory=list)
    leaving: set[str] = field(default_factory=set)
    places: list[FakePlace] = field(default_factory=list)

    def take(self) -> str | None:
        usable = [node for node in self.free if node not in self.leaving]
        if usable:
            self.free.remove(usable[0])
        return usable[0] if usable else None

    def ask(self) -> FakePlace:
        self.places.append(FakePlace(self))
        return self.places[-1]


@dataclass
class FakeFleet:
    """Engines that are busy or not; four prompts each keep them busy."""

    waiting: int = 0
    waited: float = 0.0
    busy: set[int] = field(default_factory=set)
    members: dict[int, str] = field(default_factory=dict)
    dismissed: list[int] = field(default_factory=list)
    started: int = 0

    def demand(self, now: float) -> Demand:
        return Demand(len(self.busy), 4 * len(self.busy), self.waiting, self.waited)

    def start_member(self, slot: Slot, now: float) -> int:
        self.members[self.started] = slot.node.node_id
        self.started += 1
        return self.started - 1

    def idle_members(self) -> list[int]:
        return [number for number in self.members if number not in self.busy]

    def dismiss(self, member: int, now: float) -> None:
        del self.members[member]
        self.busy.discard(member)
        self.dismissed.append(member)


class Played:
    """A fleet, its cluster and a clock."""

    def __init__(self, least: int, most: int, free: list[str]) -> None:
        self.fleet, self.cluster, self.said, self.now = FakeFleet(), FakeCluster(free), [], 0.0
        policy = ScalingPolicy(Bounds(least, most), Patience(waiting_s=10.0, idle_s=100.0))
        parts = Cluster(self.cluster.ask, lambda: self.cluster.leaving)
        self.elastic = Elastic(self.fleet, policy, parts, self.said.append)

    def go_on(self, seconds: float = 1.0) -> None:
        """Looks once a second; engines serve at once."""
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            self.elastic.look(self.now)
            for number in self.fleet.members:
                self.elastic.served(number, self.now)

    def overload(self, waiting: int) -> None:
        self.fleet.busy = set(self.fleet.members)
        self.fleet.waiting, self.fleet.waited = waiting, 10.0


def test_it_starts_with_the_least():
    played = Played(2, 4, ["a", "a", "a"])
    played.go_on(2)
    assert list(played.fleet.members) == [0, 1]
    played.go_on(300)
    assert list(played.fleet.members) == [0, 1], "idle, but there are to be two"
    assert played.elastic.told() == {"unplaced": 0, "joined": 2, "left": 0, "lost": 0}


def test_it_grows_with_the_places_that_come_and_the_others_stay_asked_for():
    played = Played(1, 4, ["a", "a"])
    played.go_on(2)
    played.overload(12)
    played.go_on(5)
    assert len(played.fleet.members) == 2
    assert played.elastic.told()["unplaced"] == 2, "what the autoscaler counts"
    played.cluster.free += ["b", "b"]
    played.go_on(1)
    assert played.fleet.members == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert played.elastic.told() == {"unplaced": 0, "joined": 4, "left": 0, "lost": 0}


def test_places_are_given_back_and_those_waited_for_first():
    played = Played(1, 4, ["a", "a"])
    played.go_on(2)
    played.overload(12)
    played.go_on(5)
    played.fleet.waiting, played.fleet.busy = 0, {1}
    played.go_on(110)
    assert played.elastic.told()["unplaced"] == 0
    assert played.fleet.members == {1: "a"}, "the idle one went, the busy one stayed"
    assert [place.node_id for place in played.cluster.places] == ["a"]
    assert played.elastic.told()["left"] == 1


def test_busy_engines_are_never_given_back():
    played = Played(1, 4, ["a"] * 4)
    played.go_on(2)
    played.overload(12)
    played.go_on(5)
    played.fleet.waiting, played.fleet.busy = 0, {0, 1, 2, 3}
    played.go_on(300)
    assert len(played.fleet.members) == 4
    assert played.fleet.dismissed == []


def test_whole_nodes_become_free():
    played = Played(1, 4, ["a", "b", "a", "a"])
    played.go_on(2)
    played.overload(100)
    played.go_on(5)
    assert list(played.fleet.members.values()) == ["a", "b", "a", "a"]
    played.fleet.waiting, played.fleet.busy = 0, {0, 2, 3}
    played.go_on(110)
    assert set(played.fleet.members.values()) == {"a"}
    assert played.fleet.dismissed == [1]


def test_a_node_that_leaves_is_cleared_and_another_is_asked_for():
    played = Played(2, 2, ["a", "b"])
    played.go_on(2)
    played.fleet.busy = {0, 1}
    played.cluster.leaving.add("a")
    played.go_on(1)
    assert played.fleet.members == {1: "b"}, "also where it has work: others get that"
    assert played.fleet.dismissed == [0]
    assert played.elastic.told()["unplaced"] == 1
    assert "node of rollout[0] is going to leave" in played.said[0]
    played.cluster.free.append("c")
    played.go_on(1)
    assert played.fleet.members == {1: "b", 2: "c"}
    assert played.elastic.told() == {"unplaced": 0, "joined": 3, "left": 1, "lost": 0}


def test_a_lost_engine_is_replaced_at_once():
    played = Played(2, 4, ["a", "a"])
    played.go_on(2)
    del played.fleet.members[0]
    played.elastic.lost(0)
    played.go_on(1)
    assert played.elastic.told()["unplaced"] == 1
    played.go_on(1)
    assert played.fleet.members == {1: "a", 2: "a"}
    played.elastic.lost(7)  # one that it never knew
    assert played.elastic.told() == {"unplaced": 0, "joined": 3, "left": 0, "lost": 1}


def test_engines_that_only_ever_die_end_the_run():
    played = Played(1, 4, ["a"])
    for number in range(2):
        played.elastic.look(played.now)
        played.elastic.look(played.now + 2)
        played.now += 4
        del played.fleet.members[number]
        played.elastic.lost(number)
    played.elastic.look(played.now)
    played.elastic.look(played.now + 2)
    with pytest.raises(WorkerDiedError, match="3 rollout workers in a row ended before they served"):
        played.elastic.lost(2)


def test_the_user_is_told_once_of_places_that_nobody_brings():
    played = Played(1, 3, ["a"])
    played.go_on(2)
    played.overload(100)
    played.go_on(400)
    (told,) = played.said
    assert told.startswith("2 rollout worker(s) have waited 120 s for a place")
    assert "goes on with 1" in told


def test_it_looks_once_a_second_however_often_it_is_called():
    played = Played(1, 1, ["a"])
    asked = []
    played.elastic.policy.target = lambda demand, now: asked.append(now) or 1
    for tenth in range(50):
        played.elastic.look(tenth / 10)
    assert asked == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_all_places_are_given_back_at_the_end():
    played = Played(2, 4, ["a"])
    played.go_on(3)
    played.elastic.end()
    assert played.cluster.places == []
    assert played.cluster.free == ["a"]
