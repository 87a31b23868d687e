"""One engine of the fleet, as its dispatcher sees it: calls that return at once, and answer later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.tickets import Burst, EngineProgress, InFlight, Outcome, Ticket, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import Slot
from raytune_rl.runtime.wait import Pending, fetch

Reply = Callable[[], Any]
"""Gives an answer that is there, or raises a RaytuneError: WorkerDiedError if its member is gone."""
Done = Callable[[Reply], None]
"""Told once, from any thread, when an answer is there."""


Keep = Callable[[Sequence[Any]], None]


@dataclass(frozen=True, slots=True)
class GroupCall:
    """A prompt that is asked.

    Attributes:
        ticket: Its ticket.
        request: Row and seeds.
        prompts: Where the row lies.
        sampling: How to draw.
        version: The weights to sample with; None: whatever is served.
        multi_turn: Whether a scheduler answers the model.
        together: Whether what a member is given at once begins in the same step.
        outlet: Told the outcome, or an error that ends the run.
        at_once: A member takes it however much it has.
    """

    ticket: Ticket
    request: EpisodeRequest
    prompts: PromptSet
    sampling: Sampling
    version: int | None
    multi_turn: bool
    together: bool
    outlet: Callable[[Outcome | Exception], None]
    at_once: bool = False


class Member(Protocol):
    """An engine. `done` of each call is told once; of a member that was ended, sooner or later or never."""

    name: str

    def ping(self, done: Done) -> None:
        """Answers when it is up: (the version that it serves or None, the sequences that it takes)."""
        ...

    def pull(self, version: int | None, in_flight: InFlight, done: Done) -> None:
        """Pulls a version (None: the newest): a WeightUpdate."""
        ...

    def progress(self, done: Done) -> None:
        """Tells how far it is: an EngineProgress."""
        ...

    def run_group(self, call: GroupCall, burst: Burst | None, done: Done) -> None:
        """Completes a prompt: its trajectories, a tuple."""
        ...

    def ask(self, method: str, done: Done) -> None:
        """Anything else."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants a prompt any more."""
        ...


class Crew(Protocol):
    """Where members come from."""

    def __len__(self) -> int:
        """The most that there can be."""
        ...

    def member(self, number: int) -> Member:
        """One that is started already, or is being started."""
        ...

    def restart(self, number: int) -> Member:
        """Ends what is left of one and starts it anew. Returns at once."""
        ...

    def end(self, number: int) -> None:
        """Ends one for good."""
        ...

    def add(self, slot: Slot) -> int:
        """Starts one more, on a place of its own; its number."""
        ...


class RolloutCrew:
    """Rollout workers, one on each reserved place.

    Args:
        group: The workers.
        keep: Told references to every answer, whose node may go; None: nodes stay.
    """

    def __init__(self, group: WorkerGroup, keep: Keep | None = None) -> None:
        self._group, self._keep = group, keep

    def __len__(self) -> int:
        return len(self._group)

    def member(self, number: int) -> Member:
        """The worker of a rank."""
        return RolloutMember(self._group, number, self._keep)

    def restart(self, number: int) -> Member:
        """A new worker in its place."""
        self._group.renew(number)
        return self.member(number)

    def end(self, number: int) -> None:
        """Its place stays reserved."""
        self._group.stop(number)

    def add(self, slot: Slot) -> int:
        """See `Crew`."""
        return self._group.add(slot)


class RolloutMember:
    """One rollout worker."""

    def __init__(self, group: WorkerGroup, rank: int, keep: Keep | None = None) -> None:
        self._group, self._rank, self._keep = group, rank, keep
        self.name = group.who(rank)
        self._asked: dict[Ticket, Any] = {}

    def ping(self, done: Done) -> None:
        """See `Member`."""
        self._call("ping", lambda facts: (facts["version"], facts["max_num_seqs"]), done, what="starting")

    def pull(self, version: int | None, in_flight: InFlight, done: Done) -> None:
        """See `Member`."""
        what = f"pulling weights {'' if version is None else version}".strip()

        def read(update: WeightUpdate) -> WeightUpdate:
            return update

        self._call("load_weights", read, done, version, in_flight, what=what)

    def progress(self, done: Done) -> None:
        """See `Member`."""

        def read(progress: EngineProgress) -> EngineProgress:
            return progress

        self._call("progress", read, done)

    def ask(self, method: str, done: Done) -> None:
        """See `Member`."""
        self._call(method, lambda answer: answer, done)

    def run_group(self, call: GroupCall, burst: Burst | None, done: Done) -> None:
        """See `Member`."""
        count = len(call.request.seeds)
        pending = self._group.submit(
            self._rank,
            "run_group",
            call.prompts.columns,
            call.request,
            call.sampling,
            call.version,
            call.prompts.extra if call.multi_turn else None,
            burst,
            what=f"sampling 1 x {count} completions",
            returns=4,
        )
        first = replace(pending, ref=pending.ref[0])
        self._asked[call.ticket] = pending.ref[0]

        def reply() -> tuple[Trajectory, ...]:
            self._asked.pop(call.ticket, None)
            facts: list[EpisodeFacts] = fetch(first)
            if self._keep is not None:
                self._keep(pending.ref[1:])
            return tuple(_trajectory(one, pending, call) for one in facts)

        _when_there(first, done, reply)

    def cancel(self, ticket: Ticket) -> None:
        """See `Member`."""
        ref = self._asked.pop(ticket, None)
        if ref is not None:
            ray.cancel(ref, recursive=False)

    def _call(
        self, method: str, read: Callable[[Any], Any], done: Done, *args: Any, what: str | None = None
    ) -> None:
        pending = self._group.submit(self._rank, method, *args, what=what)
        _when_there(pending, done, lambda: read(fetch(pending)))


def _when_there(pending: Pending, done: Done, reply: Reply) -> None:
    pending.ref.future().add_done_callback(lambda _: done(reply))


def _trajectory(episode: EpisodeFacts, answer: Pending, call: GroupCall) -> Trajectory:
    prompt = call.request.row
    return Trajectory(
        prompt=prompt,
        group=episode.prompt_id,
        data=RowPointer(answer.ref[1], episode.row),
        text=RowPointer(answer.ref[2], episode.row),
        episode=episode,
        media=call.prompts.media(prompt),
        dialogue=RowPointer(answer.ref[3], episode.row) if call.multi_turn else None,
    )
