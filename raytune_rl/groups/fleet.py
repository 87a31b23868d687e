"""The rollout fleet and the reward group as the pipelines see them: prompts in, scored trajectories out, by
reference.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytune_rl.data.media_table import ROW_COLUMN, media_of
from raytune_rl.errors import DeadlineExceededError, WorkerDiedError
from raytune_rl.groups.fleet_thread import FleetThread
from raytune_rl.groups.members import GroupCall
from raytune_rl.groups.seeds import row_seeds
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import Failure, RewardTable, Scores, TrainerState
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.rows import Prefixes, RowPointer, RowsOf, TrainBatch
from raytune_rl.protocol.tickets import Finished, FleetLoad, InFlight, Outcome, ServeReport, Ticket
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch, fetch_all

_TICKETS = itertools.count()


class RolloutFleet:
    """Engines that answer as one.

    Args:
        workers: The actors, one an engine.
        fleet: What dispatches to them.
        sampling: How completions are drawn.
        seed: Of all of them.
        evaluation: How they are drawn from held-out prompts, if that differs.
        multi_turn: Whether a scheduler answers the model.
        timeout_s: In which at least one of the prompts that are waited for must be answered, seconds.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        fleet: FleetThread,
        sampling: Sampling,
        seed: int,
        evaluation: Sampling | None = None,
        *,
        multi_turn: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.workers, self._fleet, self._timeout_s = workers, fleet, timeout_s
        self._sampling = sampling
        self._evaluation = evaluation or sampling
        self._seed = seed
        self._multi_turn = multi_turn
        self._ended: SimpleQueue[Outcome | Exception] = SimpleQueue()
        self._out: set[Ticket] = set()

    @property
    def engines(self) -> int:
        """Number of engines that serve."""
        return max(self.load().members, 1)

    def plain(self, max_tokens: int) -> RolloutFleet:
        """The same engines, drawing from the model's whole distribution, and no scheduler answers."""
        disallowed_token_ids = self._sampling.disallowed_token_ids
        return RolloutFleet(
            self.workers,
            self._fleet,
            Sampling(self._sampling.temperature, max_tokens, disallowed_token_ids=disallowed_token_ids),
            self._seed,
            timeout_s=self._timeout_s,
        )

    def greedy(self) -> RolloutFleet:
        """The same engines, always giving the likeliest token."""
        return RolloutFleet(
            self.workers,
            self._fleet,
            replace(self._sampling, temperature=0.0),
            self._seed,
            multi_turn=self._multi_turn,
            timeout_s=self._timeout_s,
        )

    # -- prompts

    def submit(self, request: EpisodeRequest, prompts: PromptSet, *, evaluation: bool = False) -> Ticket:
        """Asks a prompt; it goes to whoever has room, under whatever weights are served then.

        Args:
            request: Its row, the seeds of its completions, and a number that comes back.
            prompts: The prompt set.
            evaluation: Draw as in evaluation.
        """
        return self._submit([request], prompts, evaluation, None, together=False)[0]

    def submit_burst(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        *,
        evaluation: bool = False,
        version: int | None = None,
        at_once: bool = False,
    ) -> list[Ticket]:
        """Asks prompts at once: spread over the engines the same way each time, and each engine begins its
        part in one step, so that the digits are the same each time. With a `version`, an engine that serves
        another one refuses. With `at_once` it takes its part however much it has.
        """
        return self._submit(requests, prompts, evaluation, version, together=True, at_once=at_once)

    def completed(self, timeout_s: float) -> Iterator[Outcome]:
        """Yields the ends of tickets as they come, each once. Returns when none is out any more, or when
        `timeout_s` have passed.

        Raises:
            RaytuneError: What ends the run, such as an error in a worker that no repetition mends.
        """
        until = time.monotonic() + timeout_s
        while self._out:
            try:
                outcome = self._ended.get(timeout=max(until - time.monotonic(), 0.0))
            except Empty:
                return
            if isinstance(outcome, Exception):
                raise outcome
            self._out.discard(outcome.ticket)
            yield outcome

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants a prompt any more. It still ends: cancelled, or as it ended before."""
        self._fleet.cancel(ticket, "cancelled")

    def generate(
        self,
        prompts: PromptSet,
        rows: Sequence[int],
        completions: int,
        version: int,
        batch: int,
        *,
        evaluation: bool = False,
        at_once: bool = False,
    ) -> list[Trajectory]:
        """Samples `completions` completions of each prompt, the prompts spread over the engines; waits.

        Args:
            prompts: The prompt set.
            rows: Which of its prompts.
            completions: Of each prompt.
            version: The weights to sample with.
            batch: Number of the batch in the run, for the seeds.
            evaluation: Draw them as in evaluation.
            at_once: Each engine that serves takes its part beside whatever it has.

        Returns:
            Trajectories in the order of `rows`, those of one prompt together.

        Raises:
            WorkerDiedError: A prompt was given up, as its engine was lost each time.
            DeadlineExceededError: None was answered for so long.
        """
        # A view of its own: what else is out is told to whoever asked for it.
        own = RolloutFleet(
            self.workers,
            self._fleet,
            self._sampling,
            self._seed,
            self._evaluation,
            multi_turn=self._multi_turn,
            timeout_s=self._timeout_s,
        )
        if at_once:
            self.serve(version)
        else:
            self.pull(version)  # a member that is being started has its part
        requests = self.requests(rows, completions, batch)
        tickets = own.submit_burst(requests, prompts, evaluation=evaluation, version=version, at_once=at_once)
        done: dict[Ticket, tuple[Trajectory, ...]] = {}
        for outcome in own.each(self._timeout_s):
            if not isinstance(outcome, Finished):
                raise WorkerDiedError(outcome.reason)
            done[outcome.ticket] = outcome.trajectories
        return [trajectory for ticket in tickets for trajectory in done[ticket]]

    def requests(self, rows: Sequence[int], completions: int, batch: int) -> list[EpisodeRequest]:
        """What is asked of each prompt of a batch, with its seeds."""
        seeds = row_seeds(self._seed, batch, rows, completions)
        return [EpisodeRequest(g, int(row), s) for g, (row, s) in enumerate(zip(rows, seeds, strict=True))]

    def each(self, timeout_s: float) -> Iterator[Outcome]:
        """The ends of all tickets that are out, as they come.

        Raises:
            DeadlineExceededError: None came for so long.
        """
        while self._out:
            before = len(self._out)
            for outcome in self.completed(timeout_s):
                yield outcome
                break
            if len(self._out) == before:
                load = self.load()
                raise DeadlineExceededError(
                    f"None of {before} prompts was answered for {timeout_s:.0f} s; {load.members} engines "
                    f"serve and have {load.running} prompts, {load.waiting} wait. They may only be long: a "
                    "longer limit is set by --step_timeout."
                )

    def _submit(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        evaluation: bool,
        version: int | None,
        *,
        together: bool,
        at_once: bool = False,
    ) -> list[Ticket]:
        sampling = self._evaluation if evaluation else self._sampling
        outlet = self._ended.put
        calls = [
            GroupCall(
                Ticket(next(_TICKETS)),
                one,
                prompts,
                sampling,
                version,
                self._multi_turn,
                together,
                outlet,
                at_once,
            )
            for one in requests
        ]
        tickets = [call.ticket for call in calls]
        self._out.update(tickets)
        if calls:
            self._fleet.submit(calls)
        return tickets

    # -- weights and members

    def serve(self, version: int, *, in_flight: InFlight = "drain") -> ServeReport:
        """Every serving member pulls a version; one that is being started will before it serves."""
        return self._fleet.serve(version, in_flight, every=False)

    def pull(self, version: int) -> float:
        """Every member serves a version, also one that is being started anew in its place; the longest pull,
        seconds.
        """
        return self._fleet.serve(version, "drain", every=True).seconds

    def load(self) -> FleetLoad:
        """What the fleet is doing."""
        return self._fleet.load()

    def resize(self, members: int) -> None:
        """As many members as can be, up to this number. One that is too many finishes what it has."""
        self._fleet.resize(members)

    def forget_prompts(self) -> None:
        """Drops what the engines keep of the prompts so far."""
        self._fleet.ask("forget_prompts")

    def sleep(self) -> None:
        """Frees the engines' GPU memory while the policy trains beside them."""
        self._fleet.ask("sleep")

    def wake(self) -> None:
        """Takes it back."""
        self._fleet.ask("wake")


def batch_of(trajectories: Sequence[Trajectory]) -> TrainBatch:
    """Where the rows of trajectories lie, and the media of their prompts if the data has any. Those of one
    prompt begin with it."""
    places = [t.media for t in trajectories if t.media is not None]
    return TrainBatch(
        [t.data for t in trajectories],
        np.array([t.length for t in trajectories], dtype=np.int64),
        {ROW_COLUMN: places} if places else {},
        prefixes=Prefixes(
            np.array([t.prompt for t in trajectories], dtype=np.int64),
            np.array([t.episode.prompt_tokens for t in trajectories], dtype=np.int64),
        ),
    )


REWARDS_SHARE = 0.8
"""Part of a call's deadline that reward functions may use: what they leave over costs samples, no run."""


class RewardGroup:
    """L workers that score completions; only numbers come back."""

    def __init__(self, group: WorkerGroup) -> None:
        self.workers = group

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """Scores every trajectory; the groups are spread over the workers, each whole."""
        by_group: dict[int, list[int]] = {}
        for number, trajectory in enumerate(trajectories):
            by_group.setdefault(trajectory.group, []).append(number)
        groups = list(by_group.values())
        pending, members = [], []
        limit_s = REWARDS_SHARE * self.workers.timeout_s
        for rank, part in enumerate(np.array_split(np.arange(len(groups)), len(self.workers))):
            share = np.array([number for group in part for number in groups[group]], dtype=int)
            if not len(share):
                continue
            own = [trajectories[number] for number in share]
            dialogues = [t.dialogue for t in own if t.dialogue is not None]
            call = self.workers.submit(
                rank,
                "score",
                RowsOf.at([t.text for t in own]),
                [t.text.row for t in own],
                [prompts.extra],
                [t.prompt for t in own],
                reward_columns(own, state),
                RowsOf.at(dialogues) if dialogues else None,
                RowsOf.at([t.data for t in own]),
                [own[0].media.ref] if own[0].media is not None else None,
                limit_s,
                what=f"scoring {len(own)} completions",
            )
            pending.append(call)
            members.append(share)
        return gather_scores(fetch_all(pending), members, len(trajectories))


def reward_columns(trajectories: Sequence[Trajectory], state: TrainerState) -> dict[str, Any]:
    """The columns that reward functions receive beside the data set's, under ms-swift's names."""
    return {
        "prompt_id": [str(t.prompt) for t in trajectories],
        "request_id": [f"{t.prompt}-{t.episode.sample}" for t in trajectories],
        "finish_reason": [t.episode.finish_reason for t in trajectories],
        "is_truncated": [t.episode.finish_reason == "length" for t in trajectories],
        "completion_tokens": [t.episode.completion_tokens for t in trajectories],
        "num_turns": [t.episode.turns for t in trajectories],
        "trainer_state": state,
    }


def gather_scores(answers: Sequence[Scores], members: Sequence[NDArray], count: int) -> RewardTable:
    """Answers of several workers as one: `members` are the rows that each is about, of `count` in all."""
    first = answers[0]
    values = np.full((count, len(first.functions)), np.nan)
    failures: list[Failure] = []
    one_by_one: dict[str, str] = {}
    for scores, numbers in zip(answers, members, strict=True):
        values[numbers] = scores.values
        one_by_one |= {n: why for n, why in zip(scores.functions, scores.slow_path, strict=True) if why}
        failures += [replace(f, row=int(numbers[f.row])) for f in scores.failures]
    failed = tuple(sorted(failures, key=lambda f: f.row))
    return RewardTable(first.labels, first.functions, values, failed, one_by_one)


def read_texts(trajectories: Sequence[Trajectory], timeout_s: float) -> list[str]:
    """The completions as text, for the log."""
    return _read([t.text for t in trajectories], timeout_s)


def read_dialogues(trajectories: Sequence[Trajectory], timeout_s: float) -> list[dict[str, Any]]:
    """The messages of all turns, and what the scheduler said about them, for the log; empty for one turn."""
    return _read([t.dialogue for t in trajectories if t.dialogue is not None], timeout_s)


def read_media_names(trajectories: Sequence[Trajectory], timeout_s: float) -> list[list[str]]:
    """Paths of the media of each one's prompt, or digests of their bytes, for the log; empty where no
    prompt has any."""
    places = [t.media for t in trajectories if t.media is not None]
    if not places:
        return []
    columns = fetch(Pending(places[0].ref, "the object store", "reading names of media", timeout_s))
    return [[medium.name for medium in media_of(columns, place.row)] for place in places]


def _read(places: Sequence[RowPointer], timeout_s: float) -> list[Any]:
    refs = list({place.ref: None for place in places})
    pending = [Pending(ref, "the object store", "reading completions", timeout_s) for ref in refs]
    values: Mapping[ray.ObjectRef, list[Any]] = dict(zip(refs, (fetch(p) for p in pending), strict=True))
    return [values[place.ref][place.row] for place in places]
