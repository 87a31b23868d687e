"""The health of a fleet's members, by an injected clock."""

from __future__ import annotations

from raytune_rl.runtime.fleet_health import (
    Action,
    Admit,
    Died,
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

LIMITS = Limits(start_s=100, pull_s=50, hang_s=20, silent_s=10, probe_every_s=2)


def serving(limits: Limits = LIMITS) -> FleetHealth:
    """One member that serves since 0."""
    health = FleetHealth(limits)
    health.join(0, "rollout[0]", -2.0)
    assert health.observe(0, Started(), -1.0) == [Pull(0)]
    assert health.observe(0, Pulled(), 0.0) == [Admit(0)]
    return health


def watch(health: FleetHealth, start: float, end: float, steps: float = 0.0, **told: float) -> list[Action]:
    """Ticks twice a second; the member answers every probe at once and makes `steps` a second. What else
    came of it."""
    actions: list[Action] = []
    for half in range(int(start * 2), int(end * 2)):
        now = half / 2
        for action in health.tick(now):
            if isinstance(action, Probe):
                actions += health.observe(0, Progress(int(now * steps), True, **told), now)
            else:
                actions.append(action)
    return actions


def test_a_member_serves_only_after_it_has_pulled_weights() -> None:
    health = FleetHealth(LIMITS)
    health.join(0, "rollout[0]", 0.0)
    assert health.status(0) is Status.STARTING
    assert health.tick(99.0) == []
    assert health.observe(0, Started(), 99.5) == [Pull(0)]
    assert health.status(0) is Status.STALE
    assert health.observe(0, Progress(3, True), 100.0) == []
    assert health.status(0) is Status.STALE
    assert health.observe(0, Pulled(), 120.0) == [Admit(0)]
    assert health.status(0) is Status.SERVING


def test_starts_and_first_pulls_have_deadlines() -> None:
    health = FleetHealth(LIMITS)
    for number in (0, 1):
        health.join(number, f"rollout[{number}]", 0.0)
    health.observe(1, Started(), 30.0)
    health.observe(1, Pulling(), 60.0)
    seen = [action for now in range(120) for action in health.tick(float(now))]
    assert [(a.member, a.served, a.hung) for a in seen if isinstance(a, Lose)] == [
        (0, False, True),
        (1, False, True),
    ]
    assert "rollout[0] did not start within 100 s" in str(seen[0])
    assert "rollout[1] did not pull its weights within 50 s" in str(seen[1])


def test_a_member_that_is_busy_and_makes_no_step_is_suspected_and_then_lost() -> None:
    health = serving()
    assert watch(health, 0, 30, steps=1) == []
    assert watch(health, 30, 44) == []
    assert health.status(0) is Status.SUSPECT
    (lost,) = watch(health, 44, 60)
    assert isinstance(lost, Lose)
    assert lost.hung
    assert lost.served
    assert "rollout[0] hangs: it has work, and its engine has made no step for" in lost.reason
    assert health.status(0) is Status.LOST
    assert health.observe(0, Progress(99, True), 61) == [], "what comes late has no effect"


def test_a_suspect_that_goes_on_is_none_any_more() -> None:
    health = serving()
    watch(health, 0, 15)
    assert health.status(0) is Status.SUSPECT
    assert watch(health, 15, 40, steps=1) == []
    assert health.status(0) is Status.SERVING


def test_an_idle_member_may_rest_for_ever() -> None:
    health = serving()
    for now in range(1000):
        for action in health.tick(float(now)):
            assert action == Probe(0)
            health.observe(0, Progress(7, False), float(now))
    assert health.status(0) is Status.SERVING


def test_slow_is_not_dead() -> None:
    """A step every 15 s of 20 allowed; and one that took a minute once may take five."""
    assert watch(serving(), 0, 600, steps=1 / 15) == []
    assert watch(serving(), 0, 600, steps=1 / 90, slowest_step_s=60.0) == []
    assert watch(serving(), 0, 600, steps=1 / 90, slowest_step_s=2.0) != []


def test_a_process_that_does_not_answer_is_lost() -> None:
    health = serving()
    health.observe(0, Progress(5, True), 1.0)
    seen = [(now, action) for now in range(2, 30) for action in health.tick(float(now))]
    assert [(now, type(action)) for now, action in seen] == [(3, Probe), (14, Lose)]
    assert "rollout[0] hangs: its process has not answered for 11 s" in str(seen[1][1])


def test_nobody_is_lost_while_the_listener_itself_was_stopped() -> None:
    """Suspended for an hour, whose answer is still on its way when it looks at its clock again."""
    health = serving()
    assert health.tick(3.0) == [Probe(0)]
    assert health.tick(3600.0) == []
    assert health.observe(0, Progress(9, True), 3600.1) == []
    assert watch(health, 3601, 3700, steps=1) == []


def test_one_that_died_is_lost_at_once_and_may_join_again() -> None:
    health = serving()
    assert health.observe(0, Died("it fell"), 5.0) == [Lose(0, "it fell", False, True)]
    health.join(0, "rollout[0]", 6.0)
    assert health.observe(0, Died("it fell again"), 7.0) == [Lose(0, "it fell again", False, False)]
    assert health.count(Status.LOST) == 1


def test_one_that_left_is_not_asked_any_more() -> None:
    health = serving()
    health.observe(0, Left(), 5.0)
    assert health.status(0) is Status.RETIRED
    assert [action for now in range(5, 500) for action in health.tick(float(now))] == []
