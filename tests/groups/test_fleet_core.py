"""The fleet's decisions, with members that do what a script says and a clock that stands still."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest

from raytune_rl.errors import ConfigError, WorkerDiedError
from raytune_rl.protocol.tickets import Cancelled, Failed, FleetLoad, ServeReport, Ticket
from tests.groups.scripted import Fleet, ScriptedCrew

GONE = WorkerDiedError("rollout[0] died during 'sampling 1 x 4 completions': killed\nand more")


def test_nothing_is_sent_before_weights_are_there() -> None:
    fleet = Fleet(ScriptedCrew(2))
    fleet.core.begin(2, 0.0)
    fleet.ask(2)
    for number in (0, 1):
        fleet[number].up()
    fleet.settle()
    assert fleet.held() == {0: [], 1: []}
    assert [fleet[n].asked for n in (0, 1)] == [["ping"], ["ping"]], "there is nothing to pull yet"
    fleet.wait(500)
    done: Future[ServeReport] = Future()
    fleet.core.serve(0, "drain", True, done, fleet.now)
    fleet[0].pulled(0)
    fleet.settle()
    assert fleet.held() == {0: [0, 1], 1: []}
    assert not done.done()
    fleet[1].pulled(0)
    fleet.settle()
    assert done.result(0) == ServeReport(0, 2, 1.5)
    assert fleet.losses == []


def test_each_prompt_comes_back_once_and_makes_room() -> None:
    fleet = Fleet.serving(2)
    tickets = fleet.ask(20)
    assert {n: len(t) for n, t in fleet.held().items()} == {0: 4, 1: 4}, "16 sequences each: 8, and 8 more"
    while any(fleet.held().values()):
        for number in (0, 1):
            fleet[number].finish()
        fleet.settle()
    assert fleet.ended() == Counter({("Finished", t.number): 1 for t in tickets})
    first = fleet.outcomes[0]
    assert not isinstance(first, Exception)
    assert [t.episode.sample for t in first.trajectories] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_prompts_that_are_asked_together_begin_together() -> None:
    fleet = Fleet.serving(2, at_once=100)
    fleet.ask(5, together=True)
    assert fleet.held() == {0: [0, 1, 2], 1: [3, 4]}
    shown = [[(b.size, b.index) for b in fleet[n].bursts if b] for n in (0, 1)]
    assert shown == [[(3, 0), (3, 1), (3, 2)], [(2, 0), (2, 1)]]
    assert len({b.name for n in (0, 1) for b in fleet[n].bursts if b}) == 2
    fleet.ask(1)
    assert fleet[1].bursts[-1] is None


def test_a_lost_members_work_goes_to_the_others_and_it_serves_again_after_a_pull() -> None:
    fleet = Fleet.serving(2)
    fleet.ask(4)
    assert fleet.held() == {0: [0, 2], 1: [1, 3]}
    fleet[0].fail(GONE)
    fleet.settle()
    assert fleet.held() == {0: [], 1: [1, 3, 0, 2]}
    (sentence,) = fleet.losses
    assert sentence.startswith("rollout[0] died during 'sampling 1 x 4 completions': killed. It is started")
    assert fleet[0].life == 1
    fleet[0].up()
    fleet.settle()
    fleet.ask(1)
    assert fleet.held()[0] == [], "it has no weights"
    assert fleet.core.load(fleet.now).admitted == 2
    fleet[0].pulled(7)  # the newest
    fleet.settle()
    assert fleet.core.load(fleet.now).admitted == 3
    assert fleet.held()[0] == [4]
    for number in (0, 1):
        fleet[number].finish()
    fleet.settle()
    assert fleet.ended() == Counter({("Finished", t): 1 for t in range(5)})


def test_what_comes_from_a_former_life_has_no_effect() -> None:
    fleet = Fleet.serving(1)
    fleet.ask(1)
    former = fleet[0]
    _, done = next(iter(former.held.values()))
    former.fail(GONE)
    fleet.settle()
    done(lambda: ())
    fleet.settle()
    assert fleet.outcomes == []
    fleet[0].up()
    fleet.settle()
    fleet[0].pulled(0)
    fleet.settle()
    fleet[0].finish()
    fleet.settle()
    assert fleet.ended() == {("Finished", 0): 1}


def test_a_prompt_that_kills_is_given_up_and_the_run_goes_on() -> None:
    fleet = Fleet.serving(2, at_once=2)
    killer, *_ = fleet.ask(8)
    for _ in range(100):
        for number, member in list(fleet.crew.members.items()):
            if killer in member.held:
                member.fail(GONE)
            elif member.waiting.get("ping"):
                member.up()
            elif member.waiting.get("pull"):
                member.pulled(0)
            else:
                member.finish()
            fleet.settle()
            assert number in fleet.crew.members
        if len(fleet.outcomes) == 8:
            break
    ended = fleet.ended()
    assert ended == Counter({("Failed", 0): 1, **{("Finished", t): 1 for t in range(1, 8)}})
    (failed,) = [o for o in fleet.outcomes if isinstance(o, Failed)]
    assert "prompt 0 is given up: its engine was lost each time that it was asked. rollout[" in failed.reason
    assert 2 <= len(fleet.losses) <= 3


def test_where_no_engine_survives_any_prompt_the_run_ends() -> None:
    fleet = Fleet.serving(1, at_once=1)
    fleet.ask(9)
    for _ in range(100):
        member = fleet[0]
        if member.held:
            member.fail(GONE)
        elif member.waiting.get("ping"):
            member.up()
        elif member.waiting.get("pull"):
            member.pulled(0)
        fleet.settle()
        if any(isinstance(o, Exception) for o in fleet.outcomes):
            break
    error = fleet.outcomes[-1]
    assert isinstance(error, WorkerDiedError)
    assert "No engine survived 3 prompts in a row" in str(error)
    fleet.ask(1)
    assert fleet.outcomes[-1] is error, "whoever asks later is told too"


def test_a_member_that_never_starts_ends_the_run() -> None:
    fleet = Fleet.serving(2)
    done: Future[ServeReport] = Future()
    fleet.ask(1)
    for _ in range(4):  # the first time it had served
        fleet[0].fail(GONE)
        fleet.settle()
    fleet.core.serve(1, "drain", True, done, fleet.now)
    with pytest.raises(WorkerDiedError, match="It was lost 3 times before it served"):
        done.result(0)


def test_a_hung_engine_is_named_and_replaced_and_a_slow_one_is_left_alone() -> None:
    fleet = Fleet.serving(2)
    fleet.ask(2)
    fleet.wait(10, alive=[1])
    assert fleet.losses == []
    fleet.wait(10, alive=[1])
    assert len(fleet.losses) == 1
    assert fleet.losses[0].startswith("rollout[0] hangs: its process has not answered for")
    assert fleet.held()[1] == [1, 0]
    fleet[0].up()
    fleet.settle()
    fleet[0].pulled(0)
    fleet.wait(500, alive=[1])
    assert fleet[1].life == 0, "however long it takes: it makes steps"


def test_an_engine_whose_thread_stands_still_is_lost_too() -> None:
    fleet = Fleet.serving(1)
    fleet.ask(1)
    for _ in range(120):
        fleet.now += 0.5
        fleet[0].tell()
        fleet.settle()
        fleet.core.tick(fleet.now)
        fleet.settle()
        if fleet.losses:
            break
    assert 20 < fleet.now < 30
    assert "rollout[0] hangs: it has work, and its engine has made no step for" in fleet.losses[0]


def test_idle_members_are_not_asked_how_they_are() -> None:
    fleet = Fleet.serving(2)
    fleet.wait(60)
    assert [fleet[n].asked for n in (0, 1)] == [["ping", "pull"]] * 2
    assert fleet.losses == []


def test_serving_waits_for_whoever_serves_and_counts_what_was_half_written() -> None:
    fleet = Fleet.serving(3)
    fleet[2].fail(GONE)
    fleet.ask(6)
    fleet.settle()
    fleet[2].fail(GONE)
    fleet.settle()
    assert fleet[2].life == 1
    done: Future[ServeReport] = Future()
    fleet.core.serve(1, "keep", False, done, fleet.now)
    assert [fleet[n].waiting["pull"][0][0] for n in (0, 1)] == [(1, "keep")] * 2
    for number in (0, 1):
        fleet[number].pulled(1)
    fleet.settle()
    assert done.result(0) == ServeReport(1, 2, 1.5), "the third is being started, and will pull the newest"
    everybody: Future[ServeReport] = Future()
    fleet.core.serve(2, "drain", True, everybody, fleet.now)
    for number in (0, 1):
        fleet[number].pulled(2)
    fleet[2].up()
    fleet.settle()
    assert not everybody.done()
    fleet[2].pulled(2)
    fleet.settle()
    assert everybody.result(0).members == 3


def test_a_member_lost_in_a_pull_is_waited_for_or_not() -> None:
    for every in (False, True):
        fleet = Fleet.serving(2)
        done: Future[ServeReport] = Future()
        fleet.core.serve(1, "drain", every, done, fleet.now)
        fleet[1].pulled(1)
        fleet[0].fail(GONE)
        fleet.settle()
        assert done.done() is not every
        fleet[0].up()
        fleet.settle()
        fleet[0].pulled(1)
        fleet.settle()
        assert done.result(0).members == (2 if every else 1)


def test_one_that_pulled_an_older_version_pulls_again_before_it_serves() -> None:
    fleet = Fleet.serving(2)
    fleet.ask(1)
    fleet[0].fail(GONE)
    fleet.settle()
    fleet[0].up()
    fleet.settle()
    done: Future[ServeReport] = Future()
    fleet.core.serve(5, "keep", False, done, fleet.now)  # while it pulls version 4
    fleet[0].waiting["pull"] = fleet[0].waiting["pull"][:1]
    fleet[0].pulled(4)
    fleet.settle()
    assert fleet[0].waiting["pull"], "again"
    fleet.ask(9)
    assert fleet.held()[0] == []
    fleet[0].pulled(5)
    fleet.settle()
    assert fleet.held()[0] != []


def test_cancelling_ends_a_ticket_once() -> None:
    fleet = Fleet.serving(1, at_once=1)
    tickets = fleet.ask(4)
    assert fleet.held() == {0: [0, 1]}
    for ticket in (tickets[0], tickets[3], tickets[3], Ticket(99)):
        fleet.core.cancel(ticket, "enough", fleet.now)
    assert fleet[0].cancelled == [tickets[0]]
    assert fleet.outcomes == [Cancelled(tickets[0], "enough"), Cancelled(tickets[3], "enough")]
    assert fleet.held() == {0: [1, 2]}


def test_an_error_that_no_repetition_mends_goes_to_whoever_waits() -> None:
    fleet = Fleet.serving(1)
    fleet.ask(2)
    _, done = fleet[0].held.pop(Ticket(0))

    def reply() -> None:
        raise ConfigError("no such thing")

    done(reply)
    fleet[0].finish()
    fleet.settle()
    assert isinstance(fleet.outcomes[0], ConfigError)
    assert fleet.ended() == {("Finished", 1): 1}
    assert fleet.losses == []


def test_a_fleet_shrinks_and_grows_while_it_works() -> None:
    fleet = Fleet.serving(3)
    fleet.ask(3)
    fleet.core.resize(1, fleet.now)
    fleet.ask(3)
    assert fleet.held() == {0: [0, 3, 4, 5], 1: [1], 2: [2]}
    for number in (1, 2):
        fleet[number].finish()
    fleet.settle()
    assert fleet.crew.ended == [1, 2]
    assert fleet.core.load(fleet.now).members == 1
    fleet.core.resize(2, fleet.now)
    fleet[1].up()
    fleet.settle()
    fleet[1].pulled(0)
    fleet.settle()
    fleet.ask(1)
    assert fleet.held()[1] == [6]
    assert fleet.losses == []


def test_load_counts_members_prompts_and_idle_seconds() -> None:
    fleet = Fleet.serving(2, at_once=1)
    fleet.now = 3.0
    assert fleet.core.load(3.0) == FleetLoad(2, 0, 0, 0, 6.0, 0.0, admitted=2)
    fleet.ask(7, completions=3)
    fleet.now = 5.0
    assert fleet.core.load(5.0) == FleetLoad(2, 0, 6, 1, 6.0, 2.0, admitted=2)
    fleet[0].finish()
    fleet[1].finish()
    fleet.settle()
    fleet.now = 9.0
    busy = fleet.core.load(9.0)
    assert (busy.running, busy.waiting, busy.idle_s) == (1, 0, 10.0)


def test_half_finished_prompts_make_room_for_others() -> None:
    fleet = Fleet.serving(1, at_once=1)
    fleet.ask(3, completions=4)
    assert fleet.held() == {0: [0, 1]}
    fleet.wait(3)
    fleet[0].tell(received=2, unfinished=2)
    fleet.settle()
    assert fleet.held() == {0: [0, 1, 2]}


@pytest.mark.parametrize("seed", range(15))
def test_each_ticket_ends_once_whatever_happens(seed: int) -> None:
    """Members die, hang, start and pull at random; at the end all is answered."""
    rng = np.random.default_rng(seed)
    fleet = Fleet.serving(4)
    asked = 0
    for _ in range(400):
        member = fleet[int(rng.integers(4))]
        kind = rng.choice(["ask", "burst", "finish", "die", "up", "up", "up", "cancel", "wait", "serve"])
        if kind in ("ask", "burst") and asked < 200:
            asked += len(fleet.ask(int(rng.integers(1, 5)), together=kind == "burst"))
        elif kind == "finish" and member.held:
            member.finish(list(member.held)[int(rng.integers(len(member.held)))])
        elif kind == "die" and rng.random() < 0.3 and member.version is not None:
            member.fail(GONE)
        elif kind == "up":
            if member.waiting.get("ping"):
                member.up()
            elif member.waiting.get("pull"):
                member.pulled(asked)
        elif kind == "cancel" and asked:
            fleet.core.cancel(Ticket(int(rng.integers(asked))), "enough", fleet.now)
        elif kind == "wait":
            fleet.wait(1, alive=[n for n in range(4) if rng.random() < 0.8])
        elif kind == "serve":
            fleet.core.serve(asked, "keep", False, Future(), fleet.now)
        fleet.settle()
    for _ in range(2000):
        for member in list(fleet.crew.members.values()):
            while member.waiting.get("ping"):
                member.up()
                fleet.settle()
            while member.waiting.get("pull"):
                member.pulled(asked)
                fleet.settle()
            member.finish()
            fleet.settle()
        if len(fleet.ended()) == asked:
            break
    assert not [o for o in fleet.outcomes if isinstance(o, Exception)]
    assert Counter(t for _, t in fleet.ended().elements()) == Counter(range(asked))


def test_who_serves_a_version_already_is_not_asked_again_unless_it_slept() -> None:
    fleet = Fleet.serving(2)
    again: Future[ServeReport] = Future()
    fleet.core.serve(0, "drain", True, again, fleet.now)
    assert again.result(0) == ServeReport(0, 0, 0.0)
    asleep: Future[list[None]] = Future()
    fleet.core.ask("sleep", asleep, fleet.now)  # type: ignore[arg-type]
    assert not asleep.done()
    for number in (0, 1):
        fleet[number].answer("sleep", None)
    fleet.settle()
    assert asleep.done()
    woken: Future[ServeReport] = Future()
    fleet.core.serve(0, "drain", True, woken, fleet.now)
    assert not woken.done()
    for number in (0, 1):
        fleet[number].pulled(0)
    fleet.settle()
    assert woken.result(0).members == 2


def test_members_that_are_being_started_are_told_too() -> None:
    """As engines on shared GPUs, which are to wake up before they ever served."""
    fleet = Fleet(ScriptedCrew(2))
    fleet.core.begin(2, 0.0)
    done: Future[list[None]] = Future()
    fleet.core.ask("wake", done, 0.0)  # type: ignore[arg-type]
    assert [fleet[n].asked for n in (0, 1)] == [["ping", "wake"]] * 2


def test_engines_that_serve_from_disk_need_no_pull() -> None:
    fleet = Fleet(ScriptedCrew(1))
    fleet.core.begin(1, 0.0)
    fleet[0].version = 0
    done: Future[ServeReport] = Future()
    fleet.core.serve(0, "drain", True, done, 0.0)
    fleet.ask(1)
    fleet[0].up()
    fleet.settle()
    assert done.result(0).members == 0
    assert fleet.held() == {0: [0]}
    fleet[0].fail(GONE)
    fleet.settle()
    fleet[0].version = 0
    fleet[0].up()
    fleet.settle()
    assert fleet.held() == {0: [0]}
