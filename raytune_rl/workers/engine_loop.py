"""An engine that never waits for its callers: a thread of its own steps it while there is work.

The thread builds the engine and is the only one that touches it. Others leave commands, which are obeyed
between two steps in the order in which they came, and get futures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

import numpy as np

from raytune_rl.errors import StaleWeightsError
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.tickets import InFlight, WeightUpdate
from raytune_rl.workers.engine_prompt import Ask, Sampled

Answer = TypeVar("Answer")
Finished = Sequence[tuple[str, Sampled | Exception]]


class Engine(Protocol):
    """What the loop needs of an engine (`vllm_engine.VllmEngine`)."""

    version: int | None

    def add(self, asks: Sequence[Ask]) -> list[str]:
        """Takes completions; their names. None is taken if one cannot be."""
        ...

    def step(self) -> Finished:
        """Samples a token of each. Those that are finished now, without texts, or why they cannot be used."""
        ...

    def halted(self) -> AbstractContextManager[Finished]:
        """Nothing is sampled meanwhile; those that were finished before and not told yet."""
        ...

    def abort(self, names: Sequence[str]) -> None:
        """Forgets completions."""
        ...

    def sampled(self, names: Sequence[str]) -> list[int]:
        """Tokens sampled so far of unfinished completions."""
        ...

    def texts(self, sampled: Sequence[Sampled], sampling: Sampling) -> list[str]:
        """Completions as text."""
        ...

    def load(self, version: int | None, running: InFlight | None) -> tuple[int, float]:
        """Pulls a version (None: the newest) and serves it. The version, and the seconds that it took.
        `running`: what unfinished completions go on with; None if there are none.
        """
        ...


AnyEngine = TypeVar("AnyEngine", bound=Engine)


@dataclass
class _Batch:
    """Completions whose future is one."""

    answer: Future[list[Sampled]]
    asks: Sequence[Ask]
    sampled: dict[int, Sampled] = field(default_factory=dict)


@dataclass
class _Running:
    """One unfinished completion.

    Attributes:
        batch, index: Whose it is.
        marks: (tokens before it, version): a version samples from a token on.
    """

    batch: _Batch
    index: int
    marks: list[tuple[int, int]]

    def versions(self, count: int) -> np.ndarray:
        """Of each of `count` tokens, int32."""
        versions = np.empty(count, np.int32)
        for start, version in self.marks:
            versions[start:] = version
        return versions


class EngineLoop(Generic[AnyEngine]):
    """Steps an engine.

    Args:
        make: Builds it, in the loop's thread.

    Raises:
        Exception: What `make` raised.
    """

    def __init__(self, make: Callable[[], AnyEngine]) -> None:
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._broken: BaseException | None = None
        self._ended = False
        self.steps = 0
        self.stepping = False
        self.slowest_step_s = 0.0
        built: Future[AnyEngine] = Future()
        threading.Thread(target=self._run, args=(make, built), name="engine", daemon=True).start()
        self._engine = built.result()

    @property
    def version(self) -> int | None:
        """The weights that are served."""
        return self._engine.version

    @property
    def unfinished(self) -> int:
        """Completions that are owed."""
        return len(self._running)

    # -- from any thread

    def sample(self, asks: Sequence[Ask]) -> Future[list[Sampled]]:
        """Completes prompts."""
        return self.sample_all([asks])[0]

    def sample_all(self, batches: Sequence[Sequence[Ask]]) -> list[Future[list[Sampled]]]:
        """Completes batches of prompts, all of which begin in the same step; an answer for each batch, once
        it is complete. Cancelling one aborts its completions at the next step.

        An answer raises what is wrong with one of its prompts (`VllmEngine.add`), or that the engine is gone.
        """
        made: list[_Batch] = [_Batch(Future(), asks) for asks in batches]

        def command() -> None:
            for batch in made:
                self._begin(batch)

        self._commands.put(command)
        return [batch.answer for batch in made]

    def load(self, version: int | None, in_flight: InFlight) -> Future[WeightUpdate]:
        """Serves other weights from the next step on. With "drain" the caller sees to it that nothing runs.

        The answer raises what the pull did; then nothing is served until one succeeds.
        """
        return self.call(lambda _: self._load(version, in_flight))

    def call(self, function: Callable[[AnyEngine], Answer]) -> Future[Answer]:
        """Has a function called with the engine, between two steps."""
        answer: Future[Answer] = Future()

        def command() -> None:
            try:
                result = function(self._engine)
            except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
                settle(answer, error=error)
            else:
                settle(answer, result)

        self._commands.put(command)
        return answer

    def close(self) -> None:
        """Ends the thread after its present step; what is unfinished stays so."""
        self._ended = True
        self._commands.put(lambda: None)

    # -- in the loop's thread

    def _run(self, make: Callable[[], AnyEngine], built: Future[AnyEngine]) -> None:
        try:
            self._engine = make()
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            built.set_exception(error)
            return
        built.set_result(self._engine)
        while not self._ended:
            for command in self._due():
                command()
            if self._running:
                self._step()

    def _due(self) -> Iterator[Callable[[], None]]:
        """The commands that are there; with nothing to step, the next one, whenever it comes."""
        if not self._running:
            yield self._commands.get()
        while True:
            try:
                yield self._commands.get_nowait()
            except Empty:
                return

    def _begin(self, batch: _Batch) -> None:
        if not batch.asks:
            settle(batch.answer, [])
            return
        if self._broken is not None:
            settle(batch.answer, error=self._broken)
            return
        version = self._engine.version
        if version is None:
            settle(batch.answer, error=StaleWeightsError("asked to sample, but no weights are loaded"))
            return
        if batch.answer.cancelled():
            return
        try:
            names = self._engine.add(batch.asks)
        except Exception as error:  # noqa: BLE001  (whoever waits gets it)
            settle(batch.answer, error=error)
            return
        for index, name in enumerate(names):
            self._running[name] = _Running(batch, index, [(0, version)])

    def _step(self) -> None:
        self._drop(r.batch for r in list(self._running.values()) if r.batch.answer.cancelled())
        if not self._running:
            return
        started = time.monotonic()
        self.stepping = True
        try:
            finished = self._engine.step()
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            self._break(error)
            return
        finally:
            self.stepping = False
            self.steps += 1
            self.slowest_step_s = max(self.slowest_step_s, time.monotonic() - started)
        self._take(finished)

    def _take(self, finished: Finished) -> None:
        for name, sampled in finished:
            running = self._running.pop(name, None)
            if running is None:
                continue
            if isinstance(sampled, Exception):
                self._drop([running.batch])
                settle(running.batch.answer, error=sampled)
                continue
            versions = running.versions(len(sampled.tokens))
            running.batch.sampled[running.index] = replace(sampled, versions=versions)
            if len(running.batch.sampled) == len(running.batch.asks):
                self._complete(running.batch)

    def _complete(self, batch: _Batch) -> None:
        answers = [batch.sampled[index] for index in range(len(batch.asks))]
        texts = self._engine.texts(answers, batch.asks[0].sampling)
        settle(batch.answer, [replace(a, text=t) for a, t in zip(answers, texts, strict=True)])

    def _drop(self, batches: Iterable[_Batch]) -> None:
        """Aborts what is unfinished of batches."""
        gone = {id(batch) for batch in batches}
        names = [name for name, running in self._running.items() if id(running.batch) in gone]
        if names:
            self._engine.abort(names)
            for name in names:
                del self._running[name]

    def _break(self, error: BaseException) -> None:
        """Nothing can be sampled any more."""
        self._broken = error
        for running in self._running.values():
            settle(running.batch.answer, error=error)
        self._running.clear()

    def _load(self, version: int | None, in_flight: InFlight) -> WeightUpdate:
        if not self._running:
            return WeightUpdate(*self._engine.load(version, None))
        if in_flight == "drain":
            raise StaleWeightsError("requests were still running when new weights came")
        with self._engine.halted() as finished:
            self._take(finished)
            if in_flight == "abort":
                return self._load_and_begin_again(version)
            running = list(self._running.items())
            sampled = self._engine.sampled([name for name, _ in running])
            try:
                loaded, seconds = self._engine.load(version, in_flight if running else None)
            except BaseException as error:
                self._give_up([one for _, one in running], error)
                raise
        for (_, one), count in zip(running, sampled, strict=True):
            one.marks.append((count, loaded))
        if in_flight == "keep":
            return WeightUpdate(loaded, seconds, kept=len(running))
        return WeightUpdate(loaded, seconds, recomputed=len(running))

    def _load_and_begin_again(self, version: int | None) -> WeightUpdate:
        thrown_away = list(self._running.values())
        self._engine.abort(list(self._running))
        self._running.clear()
        try:
            loaded, seconds = self._engine.load(version, None)
            names = self._engine.add([one.batch.asks[one.index] for one in thrown_away])
        except BaseException as error:
            self._give_up(thrown_away, error)
            raise
        for one, name in zip(thrown_away, names, strict=True):
            self._running[name] = replace(one, marks=[(0, loaded)])
        return WeightUpdate(loaded, seconds, aborted=len(thrown_away))

    def _give_up(self, running: Sequence[_Running], error: BaseException) -> None:
        """Without weights nothing half-written can go on."""
        self._drop([one.batch for one in running])
        for one in running:
            settle(one.batch.answer, error=error)


def settle(future: Future[Answer], result: Answer | None = None, error: BaseException | None = None) -> None:
    """Answers, unless nobody wants the answer any more."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]
    except InvalidStateError:
        pass
