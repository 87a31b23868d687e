"""Groups on their way from prompt to rewards: asked, sampled and scored, each as soon as it can be.

Rewards are asked for while the engines sample. One call at a time, on all groups that are there by then; a
call holds whole groups.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from raytune_rl.algorithms.experience import Experience
from raytune_rl.errors import DeadlineExceededError, RaytuneError
from raytune_rl.groups.trajectory_data import TrajectoryStore
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.tickets import Cancelled, Failed, Finished, FleetLoad, InFlight, ServeReport, Ticket
from raytune_rl.protocol.tickets import Outcome as Sampled
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory

Answer = TypeVar("Answer")
POLL_S = 0.01
"""Longest look at the fleet: so long may somebody wait who wants to look himself."""


class Fleet(Protocol):
    """The engines, as far as they are asked here; see `groups.fleet`."""

    def submit(self, request: EpisodeRequest, prompts: PromptSet, *, evaluation: bool = False) -> Ticket:
        """Asks for a group."""
        ...

    def submit_burst(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        *,
        evaluation: bool = False,
        version: int | None = None,
    ) -> list[Ticket]:
        """Asks for groups that are spread the same way each time."""
        ...

    def completed(self, timeout_s: float) -> Iterator[Sampled]:
        """The ends of tickets as they come, for no longer than told."""
        ...

    def serve(self, version: int, *, in_flight: InFlight = "drain") -> ServeReport:
        """All engines serve new weights."""
        ...

    def load(self) -> FleetLoad:
        """How busy they are."""
        ...


class Aside(Generic[Answer]):
    """Runs one piece of work at a time beside the caller, in a thread that keeps no process alive."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: list[Answer | BaseException] = []

    @property
    def busy(self) -> bool:
        """Whether something runs, or has run and was not fetched."""
        return self._thread is not None

    def start(self, work: Callable[[], Answer]) -> None:
        """Starts a piece of work; the one before must have been fetched."""

        def run() -> None:
            try:
                self._outcome.append(work())
            except BaseException as error:  # noqa: BLE001, raised where the answer is fetched
                self._outcome.append(error)

        self._outcome = []
        self._thread = threading.Thread(target=run, name="rewards", daemon=True)
        self._thread.start()

    def fetch(self, timeout_s: float) -> Answer | None:
        """Its answer; None: it is not there yet.

        Raises:
            BaseException: What the work raised.
        """
        if self._thread is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        self._thread = None
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@contextmanager
def in_background(work: Callable[[float], object]) -> Iterator[None]:
    """Does `work` again and again, in a thread, while the block runs; nobody else may do it meanwhile.

    Args:
        work: Told how long it may take, seconds.

    Raises:
        BaseException: What `work` raised, at the end of the block.
    """
    ended = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            while not ended.is_set():
                work(POLL_S)
        except BaseException as error:  # noqa: BLE001, raised at the end of the block
            failure.append(error)

    thread = threading.Thread(target=run, name="rollout", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failure:
        raise failure[0]


class Score(Protocol):
    """Gives trajectories their rewards."""

    def __call__(self, batch: list[Trajectory], prompts: PromptSet) -> Experience:
        """The trajectories, row by row, with rewards."""
        ...


@dataclass(frozen=True)
class Scored:
    """A group is sampled and has its rewards, as far as there are any."""

    ticket: Ticket
    group: Experience


Outcome = Scored | Failed | Cancelled


@dataclass
class _Sampled:
    ticket: Ticket
    batch: list[Trajectory]
    prompts: PromptSet = field(repr=False)


class GroupFlow:
    """The way of groups through fleet and rewards.

    Args:
        rollout: Samples.
        score: Gives rewards.
        timeout_s: In which something must come to its end where that is waited for, seconds.
        aside: Where rewards are asked for.
        clock: Seconds, monotonic.
        whole: Rewards are asked for once all that was asked for is sampled, in the order of asking. What a
            model says of a row depends, in its last digits, on the rows beside it.
    """

    def __init__(
        self,
        rollout: Fleet,
        score: Score,
        timeout_s: float,
        aside: Aside[Experience],
        clock: Callable[[], float] = time.monotonic,
        *,
        whole: bool = False,
    ) -> None:
        self._rollout, self._score, self._aside = rollout, score, aside
        self._timeout_s, self._clock, self._whole = timeout_s, clock, whole
        self._asked: dict[Ticket, PromptSet] = {}
        self._waiting: list[_Sampled] = []
        self._scoring: list[_Sampled] = []

    @property
    def sampling(self) -> int:
        """Groups that the fleet has."""
        return len(self._asked)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not (self._asked or self._waiting or self._scoring)

    def ask(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        *,
        together: bool = False,
        evaluation: bool = False,
        version: int | None = None,
    ) -> list[Ticket]:
        """Asks for groups.

        Args:
            requests: One a group; their `prompt_id` must differ among groups of a prompt set in flight.
            prompts: Which prompts they name.
            together: They are all there is: spread over the engines the same way each time.
            evaluation: Sample as in evaluation.
            version: Of those that are together: an engine with other weights refuses.
        """
        if together:
            tickets = self._rollout.submit_burst(requests, prompts, evaluation=evaluation, version=version)
        else:
            tickets = [self._rollout.submit(one, prompts, evaluation=evaluation) for one in requests]
        self._asked |= dict.fromkeys(tickets, prompts)
        return tickets

    def pump(self, timeout_s: float) -> list[Outcome]:
        """Brings everything one step on and gives what came to its end; waits no longer than told."""
        ended: list[Outcome] = []
        if self._asked:
            for outcome in self._rollout.completed(timeout_s):
                prompts = self._asked.pop(outcome.ticket)
                if isinstance(outcome, Finished):
                    self._waiting.append(_Sampled(outcome.ticket, list(outcome.trajectories), prompts))
                else:
                    ended.append(outcome)
        elif not self._aside.busy and not self._waiting:
            time.sleep(timeout_s)
        ended += self._scored(0.0 if self._asked else timeout_s)
        return ended

    def until(self, over: Callable[[], bool]) -> Iterator[Outcome]:
        """What comes to its end, until it is over; asked anew after each look.

        Raises:
            DeadlineExceededError: Nothing came to its end for so long.
        """
        last = self._clock()
        while not over():
            if self.idle:
                raise RaytuneError(
                    "completions are waited for that nobody was asked for; this is a defect of raytune_rl"
                )
            ended = self.pump(POLL_S)
            yield from ended
            if ended:
                last = self._clock()
            elif self._clock() - last > self._timeout_s:
                raise DeadlineExceededError(
                    f"No completion of the {self.sampling} prompts in flight came, and no reward, for "
                    f"{self._timeout_s:.0f} s. `ray stack` shows what the workers are doing; a longer limit "
                    "is set by --step_timeout."
                )

    def finish_scoring(self) -> list[Outcome]:
        """Waits until all that was sampled so far has rewards."""
        ended: list[Outcome] = []
        while self._waiting or self._scoring:  # the scorer has deadlines of its own
            ended += self._scored(POLL_S)
        return ended

    def _scored(self, timeout_s: float) -> list[Outcome]:
        """What has its rewards by now; starts to score what waits."""
        ended: list[Outcome] = []
        if not self._aside.busy:
            self._start()
        experience = self._aside.fetch(timeout_s)
        if experience is not None:
            by_group = {one.batch[0].group: one.ticket for one in self._scoring}
            ended += [Scored(ticket, experience.of_groups({group})) for group, ticket in by_group.items()]
            self._scoring = []
            self._start()
        return ended

    def _start(self) -> None:
        if not self._waiting or (self._whole and self._asked):
            return
        if self._whole:
            self._waiting.sort(key=lambda one: one.ticket.number)
        prompts = self._waiting[0].prompts
        self._scoring = [one for one in self._waiting if one.prompts is prompts]
        self._waiting = [one for one in self._waiting if one.prompts is not prompts]
        batch = [trajectory for one in self._scoring for trajectory in one.batch]
        self._aside.start(lambda: self._score(batch, prompts))


@dataclass(frozen=True)
class Outside:
    """What collectors need of the world; tests give their own.

    Attributes:
        background: See `in_background`.
        aside: Where rewards are asked for.
        clock: Seconds, monotonic.
        store: Where the content of trajectories lies; None: Ray's object store.
    """

    background: Callable[[Callable[[float], object]], AbstractContextManager[None]] = in_background
    aside: Callable[[], Aside[Experience]] = Aside
    clock: Callable[[], float] = time.monotonic
    store: TrajectoryStore | None = None

    def flow(self, rollout: Fleet, score: Score, timeout_s: float, *, whole: bool = False) -> GroupFlow:
        """A flow over engines; arguments as in `GroupFlow`."""
        return GroupFlow(rollout, score, timeout_s, self.aside(), self.clock, whole=whole)
