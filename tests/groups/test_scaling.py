"""When a fleet grows and shrinks: a policy with a told clock."""

from __future__ import annotations

import pytest

from raytune_rl.groups.scaling import Bounds, Demand, Patience, ScalingPolicy

PATIENCE = Patience(waiting_s=10.0, idle_s=100.0)


def policy(least: int = 1, most: int = 8) -> ScalingPolicy:
    return ScalingPolicy(Bounds(least, most), PATIENCE)


def demand(busy: int, *, waiting: int = 0, waited: float = 0.0) -> Demand:
    """A fleet whose busy engines have four prompts each."""
    return Demand(busy, 4 * busy, waiting, waited)


def grown(busy: int = 1, waiting: int = 1000, now: float = 0.0, most: int = 8) -> ScalingPolicy:
    """A policy that wants as many as it may."""
    scaling = policy(most=most)
    assert scaling.target(demand(busy, waiting=waiting, waited=60.0), now) == most
    return scaling


def test_it_grows_only_after_prompts_waited_for_long_enough_and_then_at_once():
    scaling = policy()
    assert scaling.target(demand(1, waiting=12, waited=9.0), now=9.0) == 1
    # 4 prompts an engine, 12 wait: three more would hold them.
    assert scaling.target(demand(1, waiting=12, waited=10.0), now=10.0) == 4


def test_what_is_on_its_way_is_not_asked_for_twice():
    scaling = policy()
    for now in (20.0, 21.0, 22.0):
        assert scaling.target(demand(1, waiting=12, waited=now), now) == 4
    assert scaling.target(demand(1, waiting=13, waited=23.0), now=23.0) == 5


@pytest.mark.parametrize(("waiting", "engines"), [(1, 3), (8, 4), (9, 5), (1000, 8)])
def test_it_grows_to_what_would_hold_all_that_waits_and_never_beyond_the_most(waiting: int, engines: int):
    assert policy().target(demand(2, waiting=waiting, waited=60.0), now=60.0) == engines


def test_it_shrinks_to_the_most_that_was_needed_within_the_idle_time():
    scaling = grown(now=-10.0)
    assert scaling.target(demand(8), now=0.0) == 8
    assert scaling.target(demand(3), now=50.0) == 8
    assert scaling.target(demand(1), now=99.0) == 8, "all eight had work within the last 100 s"
    assert scaling.target(demand(1), now=101.0) == 3
    assert scaling.target(demand(0), now=149.0) == 3
    assert scaling.target(demand(0), now=151.0) == 1


def test_it_never_leaves_its_bounds():
    scaling = policy(least=2, most=5)
    for now in range(0, 1000, 10):
        load = demand(5, waiting=100, waited=99.0) if now < 300 else demand(0)
        assert scaling.target(load, now=float(now)) == (5 if now <= 390 else 2)


def test_pauses_in_which_the_policy_trains_cost_no_engine():
    scaling = grown(most=4)
    for step in range(20):
        for second in range(0, 90, 5):  # 30 s of sampling, 60 s of training
            assert scaling.target(demand(4 if second < 30 else 0), now=90.0 * step + second) == 4


def test_no_flapping_under_a_load_that_comes_and_goes():
    """A minute of more prompts than one engine holds, nine of few: it grows once a burst, and shrinks once
    after it.
    """
    scaling, members, changes = policy(), 1, []
    since = 0.0
    for now in range(0, 6000, 5):
        load = demand(1)
        if now % 600 < 60:
            since = float(now) if now % 600 == 0 else since
            waiting = 4 * (6 - members)
            load = demand(members, waiting=waiting, waited=now - since if waiting else 0.0)
        target = scaling.target(load, float(now))
        if target != members:
            changes.append((now, members, target))
            members = target
    assert [(before, after) for _, before, after in changes] == [(1, 6), (6, 1)] * 10
    assert [now for now, before, after in changes if after > before] == [600 * k + 10 for k in range(10)]


def test_a_member_that_came_late_is_not_sent_away_at_once():
    scaling = grown()
    scaling.joined(now=150.0)
    assert scaling.target(demand(1), now=151.0) == 8
    assert scaling.target(demand(1), now=251.0) == 1


def test_what_was_asked_for_in_vain_is_given_back_when_nothing_waits_any_more():
    scaling = policy()
    assert scaling.target(demand(1, waiting=8, waited=20.0), now=0.0) == 3
    assert scaling.target(demand(1), now=50.0) == 3
    assert scaling.target(demand(1), now=101.0) == 1


def test_a_size_that_is_asked_for_holds_until_the_work_says_otherwise():
    scaling = policy(least=2, most=5)
    for asked, had in ((4, 4), (99, 5), (1, 2), (3, 3)):
        scaling.resize(asked, now=10.0)
        assert scaling.target(demand(1), now=11.0) == had
    assert scaling.target(demand(3, waiting=9, waited=20.0), now=20.0) == 5
    assert scaling.target(demand(0), now=121.0) == 2


def test_engines_that_are_lost_stay_wanted():
    scaling = grown()
    assert scaling.target(demand(2, waiting=24, waited=1.0), now=5.0) == 8
    assert scaling.target(demand(0, waiting=32, waited=50.0), now=50.0) == 8


def test_bounds():
    assert (str(Bounds(1, 8)), str(Bounds(2, 2))) == ("1 to 8", "2")
    assert not Bounds(2, 2).elastic
    for least, most in ((0, 3), (3, 2)):
        with pytest.raises(ValueError, match="engines"):
            Bounds(least, most)
