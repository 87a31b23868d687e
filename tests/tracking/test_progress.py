import io
from typing import Any

import pytest
from rich.console import Console

from raytune_rl.tracking.progress import ProgressDisplay
from raytune_rl.tracking.text import duration, number
from raytune_rl.tracking.timer import StepTimer, StepTimes

TIMES = StepTimes(2.5, {"generate": 1.25, "reward": 0.25, "train": 0.5})
METRICS = {
    "reward": 0.25,
    "kl": 0.00123,
    "completions/mean_length": 34.0,
    "tokens_per_second": 12345.6,
    "x": 9.0,
}


def terminal(tty: bool) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=tty, color_system=None)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plain_line_says_it_all(clock: Any) -> None:
    console = terminal(tty=False)
    with ProgressDisplay(100, logging_steps=5, console=console, clock=clock) as display:
        assert not display.is_live
        clock.now += 20.0
        display.update(10, METRICS, TIMES)
    assert output(console) == (
        "step 10/100 | reward 0.25 | kl 0.00123 | length 34 | tokens/s 12,346 | "
        "2.50 s (generate 1.25, reward 0.25, train 0.50, other 0.50) | elapsed 20s | remaining 3m 0s\n"
    )


def test_lines_come_at_the_first_step_each_interval_and_the_last(clock: Any) -> None:
    console = terminal(tty=False)
    display = ProgressDisplay(13, start_step=6, logging_steps=5, console=console, clock=clock)
    for step in range(7, 14):
        display.update(step, {})
    assert [line.split()[1] for line in output(console).splitlines()] == ["7/13", "10/13", "13/13"]


@pytest.mark.parametrize(
    ("tty", "ci", "live"), [(True, "", True), (True, "true", False), (True, "0", True), (False, "", False)]
)
def test_the_live_display_is_for_terminals_outside_ci(
    tty: bool, ci: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", "xterm")
    assert ProgressDisplay(10, console=terminal(tty)).is_live is live


def test_the_live_display_shows_metrics_split_and_phase(clock: Any) -> None:
    console = terminal(tty=True)
    with ProgressDisplay(100, console=console, live=True, clock=clock) as display:
        display.update(30, METRICS, TIMES)
        display.phase("generate")
        display.update(31, {"kl": 0.5}, TIMES)
    text = output(console)
    for part in ("step 31/100", "reward 0.25", "kl 0.5", "generate 1.25", "now: generate"):
        assert part in text


def test_the_remaining_time_counts_only_steps_of_this_process(clock: Any) -> None:
    console = terminal(tty=False)
    display = ProgressDisplay(100, start_step=90, console=console, clock=clock)
    clock.now += 10.0
    display.update(95, {})
    assert "remaining 10s" in output(console)


def test_the_timer_counts_each_second_once(clock: Any) -> None:
    seen: list[str | None] = []
    timer = StepTimer(clock, on_phase=seen.append)
    clock.now += 1.0
    with timer.phase("train"):
        clock.now += 2.0
        with timer.phase("sync"):
            clock.now += 4.0
        clock.now += 8.0
    with timer.phase("sync"):
        clock.now += 16.0
    times = timer.finish()
    assert times == StepTimes(31.0, {"train": 10.0, "sync": 20.0})
    assert times.other == 1.0
    assert seen == ["train", "sync", "train", None, "sync", None]
    assert times.metrics() == {
        "step_time": 31.0,
        "profiling/train": 10.0,
        "profiling/sync": 20.0,
        "profiling/other": 1.0,
    }
    clock.now += 3.0
    assert timer.finish() == StepTimes(3.0, {}), "the next step starts from nothing"


def fail_after_two_seconds(clock: Any) -> None:
    clock.now += 2.0
    raise KeyError


def test_a_failing_phase_still_counts_and_closes(clock: Any) -> None:
    timer = StepTimer(clock)
    with pytest.raises(KeyError), timer.phase("train"):
        fail_after_two_seconds(clock)
    assert timer.finish().phases == {"train": 2.0}
    with timer.phase("train"), pytest.raises(RuntimeError, match="train"):
        timer.finish()


def test_numbers_and_durations() -> None:
    assert [duration(s) for s in (0.2, 59.6, 3725, 90061, float("inf"))] == [
        "0s",
        "1m 0s",
        "1h 2m 5s",
        "1d 1h 1m 1s",
        "unknown",
    ]
    assert [number(v) for v in (None, 0, 1234567, 0.25, 1.234e-5, 12345.6, -0.5, float("nan"))] == [
        "-",
        "0",
        "1,234,567",
        "0.25",
        "1.23e-05",
        "12,346",
        "-0.5",
        "nan",
    ]


def test_paused_time_belongs_to_no_step() -> None:
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    with timer.phase("train"):
        now[0] += 2
        with timer.paused():
            now[0] += 50
        now[0] += 1
    with timer.paused():
        now[0] += 100
    assert timer.so_far() == 3
    times = timer.finish()
    assert (times.total, dict(times.phases)) == (3, {"train": 3})
