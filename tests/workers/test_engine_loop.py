"""The engine's thread against an engine that counts: a token is its position, a step is one token of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager

import numpy as np
import pytest

from raytune_rl.errors import DataError, StaleWeightsError
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.tickets import InFlight, WeightUpdate
from raytune_rl.workers.engine_loop import EngineLoop
from raytune_rl.workers.engine_prompt import Ask, EnginePrompt, Sampled

SAMPLING = Sampling(1.0, 100)


class Counting:
    """Ends a completion at its limit. `allow` lets it make steps; it stands still without."""

    def __init__(self) -> None:
        self.version: int | None = 0
        self.loads: list[tuple[int | None, InFlight | None]] = []
        self.open: dict[str, list[int]] = {}  # limit, tokens
        self.began: list[tuple[int, ...]] = []  # seeds of the completions that were added at once
        self.allowed = threading.Semaphore(0)
        self.numbers = 0
        self.broken = False

    def allow(self, steps: int) -> None:
        """Lets it make steps."""
        self.allowed.release(steps)

    def add(self, asks: Sequence[Ask]) -> list[str]:
        """Takes completions."""
        if any(ask.seed < 0 for ask in asks):
            raise DataError("a seed below 0")
        self.began.append(tuple(ask.seed for ask in asks))
        names = [str(self.numbers + i) for i in range(len(asks))]
        self.numbers += len(asks)
        self.open |= {n: [a.limit, 0] for n, a in zip(names, asks, strict=True)}
        return names

    def step(self) -> list[tuple[str, Sampled | Exception]]:
        """A token of each."""
        assert self.allowed.acquire(timeout=20)
        if self.broken:
            raise RuntimeError("it broke")
        finished: list[tuple[str, Sampled | Exception]] = []
        for name, (limit, tokens) in list(self.open.items()):
            self.open[name][1] = tokens + 1
            if tokens + 1 == limit:
                del self.open[name]
                ids = np.arange(limit, dtype=np.int32)
                own = Sampled(ids, -ids.astype(np.float32), "", "length", np.zeros(0, np.int32))
                finished.append((name, DataError("too long") if limit == 13 else own))
        return finished

    @contextmanager
    def halted(self) -> Iterator[list[tuple[str, Sampled | Exception]]]:
        """It stands still anyway."""
        yield []

    def abort(self, names: Sequence[str]) -> None:
        """Forgets completions."""
        for name in names:
            del self.open[name]

    def sampled(self, names: Sequence[str]) -> list[int]:
        """Tokens so far."""
        return [self.open[name][1] for name in names]

    def texts(self, sampled: Sequence[Sampled], sampling: Sampling) -> list[str]:
        """How long each is, in words."""
        return [f"{len(one.tokens)} tokens" for one in sampled]

    def load(self, version: int | None, running: InFlight | None) -> tuple[int, float]:
        """Other weights."""
        self.loads.append((version, running))
        self.version = None
        if version == 99:
            raise StaleWeightsError("not in the store")
        self.version = version
        return version or 0, 0.5


@pytest.fixture
def loop() -> Iterator[EngineLoop[Counting]]:
    """A loop over it."""
    made = EngineLoop(Counting)
    yield made
    made.close()
    made._engine.allow(1000)


def asks(*limits: int, seed: int = 0) -> list[Ask]:
    prompt = EnginePrompt(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    return [Ask(prompt, seed + i, SAMPLING, limit) for i, limit in enumerate(limits)]


def after(loop: EngineLoop[Counting], steps: int) -> Counting:
    """The engine, once it has made so many steps in all and stands still."""
    engine = loop._engine
    engine.allow(steps - loop.steps)
    while loop.steps < steps:
        threading.Event().wait(0.001)
    return engine


def test_each_batch_is_answered_when_it_is_complete(loop: EngineLoop[Counting]) -> None:
    first, second = loop.sample_all([asks(2, 4), asks(3, seed=10)])
    after(loop, 3)
    done = second.result(timeout=5)
    assert [(one.text, one.tokens.tolist(), one.versions.tolist()) for one in done] == [
        ("3 tokens", [0, 1, 2], [0, 0, 0])
    ]
    assert not first.done()
    after(loop, 4)
    assert [len(one.tokens) for one in first.result(timeout=5)] == [2, 4]
    assert loop.unfinished == 0


def test_what_is_asked_together_begins_together(loop: EngineLoop[Counting]) -> None:
    early = loop.sample(asks(5, seed=50))
    after(loop, 1)
    both = loop.sample_all([asks(3), asks(3, 3, seed=10)])
    engine = after(loop, 5)
    early.result(timeout=5)
    assert [len(b.result(timeout=5)) for b in both] == [1, 2]
    assert engine.began == [(50,), (0,), (10, 11)]


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_tokens_bear_the_version_that_sampled_them(loop: EngineLoop[Counting], in_flight: InFlight) -> None:
    early = loop.sample(asks(6, 4))
    after(loop, 2)
    first = loop.load(1, in_flight)
    late = loop.sample(asks(3))
    after(loop, 4)
    second = loop.load(2, in_flight)
    engine = after(loop, 6)
    versions = [one.versions.tolist() for one in (*early.result(timeout=5), *late.result(timeout=5))]
    # It is obeyed after the step that is under way.
    assert versions == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1], [1, 1, 2]]
    reports = [first.result(timeout=5), second.result(timeout=5)]
    counted = [r.kept if in_flight == "keep" else r.recomputed for r in reports]
    assert counted == [2, 2]
    assert engine.loads == [(1, in_flight), (2, in_flight)]


def test_aborted_requests_begin_again_with_their_seeds(loop: EngineLoop[Counting]) -> None:
    early = loop.sample(asks(5, 6, seed=7))
    after(loop, 3)
    update = loop.load(1, "abort")
    engine = after(loop, 4 + 6)
    assert [one.versions.tolist() for one in early.result(timeout=5)] == [[1] * 5, [1] * 6]
    assert engine.began == [(7, 8), (7, 8)]
    assert update.result(timeout=5) == WeightUpdate(1, 0.5, aborted=2)
    assert engine.loads == [(1, None)]


def test_a_drain_is_not_for_half_written_answers(loop: EngineLoop[Counting]) -> None:
    early = loop.sample(asks(3))
    after(loop, 1)
    too_early = loop.load(1, "drain")
    after(loop, 2)
    with pytest.raises(StaleWeightsError, match="still running"):
        too_early.result(timeout=5)
    after(loop, 3)
    early.result(timeout=5)
    assert loop.load(1, "drain").result(timeout=5) == WeightUpdate(1, 0.5)


def test_a_pull_that_fails_ends_what_is_half_written_and_serves_nothing(loop: EngineLoop[Counting]) -> None:
    early = loop.sample(asks(5))
    after(loop, 1)
    pull = loop.load(99, "keep")
    after(loop, 2)
    for waited in (pull, early):
        with pytest.raises(StaleWeightsError, match="not in the store"):
            waited.result(timeout=5)
    with pytest.raises(StaleWeightsError, match="no weights are loaded"):
        loop.sample(asks(1)).result(timeout=5)
    assert loop.load(3, "keep").result(timeout=5) == WeightUpdate(3, 0.5)
    later = loop.sample(asks(1))
    after(loop, loop.steps + 1)
    assert later.result(timeout=5)[0].versions.tolist() == [3]


def test_a_cancelled_batch_makes_room(loop: EngineLoop[Counting]) -> None:
    gone, stays = loop.sample_all([asks(50, 50), asks(4)])
    after(loop, 1)
    assert gone.cancel()
    engine = after(loop, 3)
    assert len(engine.open) == loop.unfinished == 1
    after(loop, 4)
    assert len(stays.result(timeout=5)) == 1
    with pytest.raises(CancelledError):
        gone.result(timeout=5)


def test_a_wrong_prompt_is_its_own_batchs_misfortune(loop: EngineLoop[Counting]) -> None:
    refused, unusable, right = loop.sample_all([asks(3, seed=-1), asks(13, 20), asks(15)])
    with pytest.raises(DataError, match="a seed below 0"):
        refused.result(timeout=5)
    engine = after(loop, 13)
    with pytest.raises(DataError, match="too long"):
        unusable.result(timeout=5)
    assert len(engine.open) == 1, "its other completion is not wanted any more"
    after(loop, 15)
    assert right.result(timeout=5)[0].text == "15 tokens"


def test_an_engine_that_breaks_says_so_to_everybody(loop: EngineLoop[Counting]) -> None:
    early = loop.sample(asks(3))
    after(loop, 1).broken = True
    loop._engine.allow(1)
    for waited in (early, loop.sample(asks(3))):
        with pytest.raises(RuntimeError, match="it broke"):
            waited.result(timeout=5)


def test_what_cannot_be_built_is_raised_where_it_was_asked_for() -> None:
    def make() -> Counting:
        raise DataError("no such model")

    with pytest.raises(DataError, match="no such model"):
        EngineLoop(make)
