"""A fleet whose members come and go: each prompt still ends once. Scripted members, places and clock."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from raytune_rl.errors import WorkerDiedError
from raytune_rl.groups.elastic import Cluster, Elastic
from raytune_rl.groups.scaling import Bounds, Patience, ScalingPolicy
from raytune_rl.protocol.tickets import ServeReport
from tests.groups.scripted import Fleet, ScriptedCrew
from tests.groups.test_elastic import FakeCluster

GONE = WorkerDiedError("rollout[1] died during 'sampling 1 x 4 completions': its node is gone")


@dataclass
class Growing:
    """A fleet of scripted members that may grow; one serves at the start."""

    most: int = 3
    cluster: FakeCluster = field(default_factory=lambda: FakeCluster(["a", "b", "c", "d"]))
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = Fleet(ScriptedCrew(0))
        policy = ScalingPolicy(Bounds(1, self.most), Patience(waiting_s=5.0, idle_s=50.0))
        parts = Cluster(self.cluster.ask, lambda: self.cluster.leaving)
        self.elastic = Elastic(self.fleet.core, policy, parts, self.said.append)
        self.fleet.core.elastic = self.elastic
        self.fleet.core.begin(0, 0.0)
        self.version = 0
        self.fleet.core.serve(0, "drain", True, Future(), 0.0)
        self.go_on(3)
        assert self.serving() == [0]

    def go_on(self, seconds: float, finish: bool = False) -> None:
        """Members start, pull and answer probes; with `finish` they also answer prompts."""
        for _ in range(int(seconds * 2)):
            self.fleet.wait(0.5)
            for number, member in list(self.fleet.crew.members.items()):
                if number in self.fleet.crew.ended:
                    continue
                member.steps += 1
                member.tell()
                if member.waiting.get("ping"):
                    member.up()
                elif member.waiting.get("pull"):
                    member.pulled(self.version)
                elif finish:
                    member.finish()
                self.fleet.settle()

    def serving(self) -> list[int]:
        return self.fleet.core._dispatcher.members


def test_it_grows_while_prompts_wait_and_new_members_pull_before_they_serve() -> None:
    growing = Growing()
    tickets = growing.fleet.ask(12)
    assert growing.fleet.held()[0] == [0, 1, 2, 3]
    growing.go_on(4)
    assert growing.serving() == [0]
    growing.version = 7  # the newest in the store by then
    growing.go_on(6)
    assert growing.serving() == [0, 1, 2]
    assert [growing.fleet[n].asked[:2] for n in (1, 2)] == [["ping", "pull"]] * 2
    assert [growing.fleet[n].version for n in (1, 2)] == [7, 7]
    assert growing.fleet.held() == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]}
    load = growing.fleet.core.load(growing.fleet.now)
    assert (load.members, load.joined, load.unplaced, load.waiting) == (3, 3, 0, 0)
    growing.go_on(3, finish=True)
    assert growing.fleet.ended() == Counter({("Finished", t.number): 1 for t in tickets})


def test_new_weights_wait_for_no_member_that_is_still_being_started() -> None:
    """Those that serve go on with the work; the new one pulls the newest once it is up."""
    growing = Growing()
    growing.fleet.ask(12)
    growing.fleet.wait(7, alive=[0])
    assert [growing.fleet[n].asked for n in (1, 2)] == [["ping"], ["ping"]]
    done: Future[ServeReport] = Future()
    growing.fleet.core.serve(1, "keep", True, done, growing.fleet.now)
    growing.fleet[0].pulled(1)
    growing.fleet.settle()
    assert done.result(0).members == 1
    growing.version = 1
    growing.go_on(2)
    assert [growing.fleet[n].version for n in growing.serving()] == [1, 1, 1]


def test_it_shrinks_when_members_idle_and_gives_their_places_back() -> None:
    growing = Growing()
    growing.fleet.ask(12)
    growing.go_on(10)
    growing.go_on(3, finish=True)
    assert len(growing.cluster.places) == 3
    growing.go_on(60)
    assert growing.serving() == [2], "with as many on each node, the newest stays"
    assert len(growing.cluster.places) == 1
    assert growing.fleet.crew.ended == [0, 1]
    ended = growing.fleet.ended()
    tickets = growing.fleet.ask(2)
    growing.go_on(2, finish=True)
    assert growing.fleet.ended() - ended == Counter({("Finished", t.number): 1 for t in tickets})
    assert growing.fleet.core.load(growing.fleet.now).left == 2


def test_its_size_can_be_asked_for() -> None:
    growing = Growing()
    growing.fleet.core.resize(3, growing.fleet.now)
    growing.go_on(5)
    assert growing.serving() == [0, 1, 2]
    growing.fleet.core.resize(1, growing.fleet.now)
    growing.go_on(3)
    assert len(growing.serving()) == len(growing.cluster.places) == 1


def test_a_leaving_nodes_prompts_go_to_others_first_and_its_late_answers_have_no_effect() -> None:
    growing = Growing()
    tickets = growing.fleet.ask(16)
    growing.go_on(10)
    assert growing.fleet.held()[1] == [4, 5, 6, 7]
    leaving = growing.fleet[1]
    held = dict(leaving.held)
    growing.cluster.leaving.add("b")
    growing.go_on(1)
    assert growing.fleet.crew.ended == [1]
    assert "node of rollout[1] is going to leave" in growing.said[0]
    growing.fleet[0].finish()
    growing.fleet.settle()
    assert growing.fleet.held()[0] == [4, 5, 6, 7], "before those that waited"
    for ticket, (_, done) in held.items():
        assert ticket.number in (4, 5, 6, 7)
        done(lambda: ())
    growing.fleet.settle()
    growing.go_on(20, finish=True)
    assert growing.fleet.ended() == Counter({("Finished", t.number): 1 for t in tickets})
    assert growing.fleet.losses == [], "nobody was at fault"
    load = growing.fleet.core.load(growing.fleet.now)
    assert (load.joined, load.left, load.lost) == (4, 1, 0), "another came on another node"


def test_a_lost_members_place_is_given_back_and_another_is_asked_for() -> None:
    growing = Growing()
    tickets = growing.fleet.ask(12)
    growing.go_on(10)
    place = growing.cluster.places[1]
    growing.cluster.free = ["e"]
    growing.fleet[1].fail(GONE)
    growing.fleet.settle()
    assert place.gone
    assert growing.fleet.losses[0].endswith("is gone. Another is asked for, and its work is done again.")
    growing.go_on(5)
    assert growing.serving() == [0, 2, 3]
    growing.go_on(5, finish=True)
    assert growing.fleet.ended() == Counter({("Finished", t.number): 1 for t in tickets})
    assert growing.fleet.core.load(growing.fleet.now).lost == 1


def test_weights_wait_for_no_member_that_is_gone() -> None:
    growing = Growing()
    growing.fleet.ask(12)
    growing.go_on(10)
    done: Future[ServeReport] = Future()
    growing.fleet.core.serve(1, "keep", True, done, growing.fleet.now)
    growing.cluster.leaving.add("b")
    for number in (0, 2):
        growing.fleet[number].pulled(1)
    growing.fleet.settle()
    assert not done.done()
    growing.fleet.wait(1.0)
    assert done.result(0).members == 2


def test_members_that_never_serve_end_the_run_and_whoever_waits_is_told() -> None:
    growing = Growing()
    growing.fleet.ask(12)
    growing.fleet.wait(8)

    def starting_in_vain() -> None:
        for _ in range(10):
            for number, member in list(growing.fleet.crew.members.items()):
                if number and member.waiting.get("ping"):
                    member.fail(GONE)
            growing.fleet.settle()
            growing.fleet.wait(2.0)

    with pytest.raises(WorkerDiedError, match="3 rollout workers in a row ended before they served"):
        starting_in_vain()


@pytest.mark.parametrize("seed", range(12))
def test_each_ticket_ends_once_whoever_comes_and_goes(seed: int) -> None:
    rng = random.Random(seed)
    growing = Growing(most=4)
    tickets = []
    for turn in range(60):
        tickets += growing.fleet.ask(rng.randrange(1, 6))
        growing.go_on(rng.choice([0.5, 3, 20]), finish=rng.random() < 0.6)
        alive = [n for n in growing.fleet.crew.members if n not in growing.fleet.crew.ended]
        chance = rng.random()
        if chance < 0.2:
            growing.cluster.leaving.add(rng.choice("abcd"))
        elif chance < 0.3 and len(growing.serving()) > 1:
            growing.fleet[rng.choice(growing.serving())].fail(GONE)
            growing.fleet.settle()
        elif chance < 0.5:
            growing.cluster.leaving.clear()
            growing.cluster.free.append(f"n{turn}")
        assert len(alive) <= 5
    growing.cluster.leaving.clear()
    growing.cluster.free += ["x", "y"]
    growing.go_on(60, finish=True)
    ended = growing.fleet.ended()
    assert sorted(number for _, number in ended) == [t.number for t in tickets]
    assert set(ended.values()) == {1}
    load = growing.fleet.core.load(growing.fleet.now)
    assert load.joined - load.left - load.lost == load.members
    assert len(growing.cluster.places) == load.members + load.starting + load.unplaced
