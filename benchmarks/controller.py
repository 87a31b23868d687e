"""How many completions a second the controller dispatches and takes back, with 10, 100 and 1,000 engines.

    python -m benchmarks.controller

The fleet is the product's (its thread, dispatcher, health, tickets, seeds); the engines answer from a script,
in this process, without Ray. Nothing is sampled: what is measured is what the driver itself does for each
completion, which is the seeds, the dispatch, the bookkeeping and the trajectories.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.table import machine, median, render, spread
from raytune_rl.groups.fleet import RolloutFleet
from raytune_rl.groups.fleet_thread import FleetThread
from raytune_rl.groups.members import Done, GroupCall, Member
from raytune_rl.groups.seeds import row_seeds
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.tickets import Burst, EngineProgress, Finished, InFlight, Ticket, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.placement import Slot

PROMPTS = 5_000
BATCH = 64
"""Prompts of a generation, whose seeds are made at once."""
AT_ONCE = 56
"""Sequences of an engine; the fleet gives it 8 more."""


class ScriptedEngine:
    """Hands what it is given to the one thread that answers for all engines."""

    def __init__(self, number: int, answers: SimpleQueue[Any]) -> None:
        self.name, self._answers = f"engine[{number}]", answers

    def ping(self, done: Done) -> None:
        done(lambda: (0, AT_ONCE))

    def pull(self, version: int | None, in_flight: InFlight, done: Done) -> None:
        done(lambda: WeightUpdate(version or 0, 0.0))

    def progress(self, done: Done) -> None:
        done(lambda: EngineProgress(time.monotonic_ns(), True, 0.0, 0, 10**6, 0))

    def ask(self, method: str, done: Done) -> None:
        done(lambda: None)

    def cancel(self, ticket: Ticket) -> None:
        raise NotImplementedError("nothing is cancelled here")

    def run_group(self, call: GroupCall, burst: Burst | None, done: Done) -> None:
        self._answers.put((call, done))


def answer(answers: SimpleQueue[Any], hold: int) -> None:
    """Answers prompts in the order in which they were given, `hold` of them under way at a time."""
    under_way: deque[tuple[GroupCall, Done]] = deque()
    while True:
        given = answers.get()
        if given is None:
            break
        under_way.append(given)
        if len(under_way) > hold:
            finish(*under_way.popleft())
        while answers.empty() and under_way:
            finish(*under_way.popleft())


def finish(call: GroupCall, done: Done) -> None:
    """An answer, as `members.RolloutMember` makes it of what the worker returns."""
    ref, request = object(), call.request

    def reply() -> tuple[Trajectory, ...]:
        facts = [EpisodeFacts(request.prompt_id, s, s, 64, 200, "stop", 0) for s in range(len(request.seeds))]
        return tuple(
            Trajectory(request.row, request.prompt_id, RowPointer(ref, f.row), RowPointer(ref, f.row), f)
            for f in facts
        )

    done(reply)


class ScriptedCrew:
    """Engines that are there from the beginning."""

    def __init__(self, count: int, answers: SimpleQueue[Any]) -> None:
        self._members = [ScriptedEngine(number, answers) for number in range(count)]

    def __len__(self) -> int:
        return len(self._members)

    def member(self, number: int) -> Member:
        return self._members[number]

    def restart(self, number: int) -> Member:
        raise NotImplementedError("no engine is lost here")

    def end(self, number: int) -> None:
        raise NotImplementedError("no engine leaves here")

    def add(self, slot: Slot) -> int:
        raise NotImplementedError("no engine joins here")


@dataclass(frozen=True)
class Measured:
    """One round.

    Attributes:
        rate: Completions a second.
        cpu_us: Processor time of this process for each completion, microseconds.
    """

    rate: float
    cpu_us: float


def measure(members: int, completions: int, groups: int) -> Measured:
    """Asks `groups` prompts, as many under way as the fleet takes, and twice that waiting."""
    answers: SimpleQueue[Any] = SimpleQueue()
    room = members * max((AT_ONCE + 8) // completions, 1)
    Thread(target=answer, args=(answers, room // 2), daemon=True).start()
    thread = FleetThread(ScriptedCrew(members, answers), Limits(), print, 60.0)
    workers: Any = SimpleNamespace(__len__=lambda: members)
    fleet = RolloutFleet(workers, thread, Sampling(1.0, 256), seed=42)
    account = Account((), {}, None, (), None, ())
    prompts = PromptSet(None, None, None, np.full(PROMPTS, 64), account)
    fleet.pull(0)
    asked = ended = 0
    rows: list[int] = []
    seeds: list[tuple[int, ...]] = []

    def ask() -> None:
        nonlocal asked
        place = asked % BATCH
        if not place:
            rows[:] = [(asked + i) % PROMPTS for i in range(BATCH)]
            seeds[:] = row_seeds(42, asked // BATCH, rows, completions)
        fleet.submit(EpisodeRequest(asked, rows[place], seeds[place]), prompts)
        asked += 1

    started, cpu = time.perf_counter(), time.process_time()
    while asked < min(3 * room, groups):
        ask()
    while ended < groups:
        for outcome in fleet.completed(10.0):
            assert isinstance(outcome, Finished)
            assert len(outcome.trajectories) == completions
            ended += 1
            if asked < groups:
                ask()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    thread.close()
    answers.put(None)
    return Measured(groups * completions / seconds, 1e6 * cpu / (groups * completions))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/controller.py",
    )
    parser.add_argument("--members", type=int, nargs="+", default=[10, 100, 1000], help="engines of a fleet")
    parser.add_argument("--completions", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--groups", type=int, default=20_000, help="prompts of a round (default 20,000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, in turns (default 5)")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    found: dict[int, list[Measured]] = {members: [] for members in options.members}
    for number in range(1 + options.rounds):
        for members, rounds in found.items():
            one = measure(members, options.completions, options.groups)
            if number:  # the first is for warmth
                rounds.append(one)
    header = ["members", "groups/s", "completions/s", "min-max", "CPU a completion, us", "rate / the first's"]
    rows = []
    base = median(m.rate for m in found[options.members[0]])
    for members, rounds in found.items():
        rate = median(m.rate for m in rounds)
        rows.append(
            [
                f"{members:,}",
                f"{rate / options.completions:,.0f}",
                f"{rate:,.0f}",
                spread(m.rate for m in rounds),
                f"{median(m.cpu_us for m in rounds):.1f}",
                f"{rate / base:.2f}",
            ]
        )
    print(f"\nThe controller with scripted engines, {options.completions} completions a prompt")
    print(machine() + "\n")
    print(render(header, rows, options.markdown))


if __name__ == "__main__":
    main()
