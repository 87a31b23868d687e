"""Waiting for actors: every wait has a deadline, every failure has a name.

All `ray.get` calls of the controllers go through `fetch`, so that no error of Ray's reaches a user unnamed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.experimental import get_local_object_locations

from raytune_rl.errors import DeadlineExceededError, RaytuneError, WorkerDiedError, WorkerFailedError
from raytune_rl.runtime import kernel_kills
from raytune_rl.runtime.health import health
from raytune_rl.runtime.out_of_memory import explained, killed

WATCHED_EVERY_S = 1.0
"""Seconds between two looks at who is waited for."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Pending:
    """An answer that is awaited.

    Attributes:
        ref: What Ray promised: one reference, or a list of them for a call with several returns.
        who: The actor, as a person would name it ("rollout[1]").
        what: The work asked for ("generate 32 completions").
        timeout_s: Seconds from the moment of waiting.
        redo: For work that may be done again elsewhere: given the error with which its worker was lost, or
            the deadline at which it hung, asks anew. None: the loss is the caller's.
        after: Calls on the same worker, earlier than this one, without which this one would mean nothing.
        watch: Called every `WATCHED_EVERY_S` while the answer is owed; it raises to end the wait.
    """

    ref: Any
    who: str
    what: str
    timeout_s: float
    redo: Callable[[WorkerDiedError | DeadlineExceededError], Pending] | None = field(
        default=None, compare=False
    )
    after: tuple[Pending, ...] = ()
    watch: Callable[[], None] | None = field(default=None, compare=False)


def fetch(pending: Pending) -> Any:
    """Waits for one answer.

    Raises:
        DeadlineExceededError: No answer within `timeout_s`.
        WorkerDiedError: The process ended while it was working, or an object was lost with its node.
        WorkerFailedError: The call, or the actor's constructor before it, raised. An error that is a
            `RaytuneError` already keeps its class and its message.
    """
    for earlier in pending.after:
        fetch(earlier)
    try:
        return ray.get(pending.ref, timeout=pending.timeout_s)
    except RayTaskError as error:
        # First: a worker's own time-out or lost actor arrives as both a RayTaskError and that error's class.
        raise _failure(pending, error) from None
    except GetTimeoutError as error:
        raise DeadlineExceededError(
            f"{pending.who} did not finish '{pending.what}' within {pending.timeout_s:.0f} s. "
            "It may hang or only be slow: `ray stack` shows what it is doing; a longer limit is set by "
            "--step_timeout."
        ) from error
    except RayActorError as error:
        if error.args and isinstance(error.args[0], RayTaskError):  # its constructor raised
            raise _failure(pending, error.args[0]) from None
        health().look()
        said = readable(error)
        short = explained(pending.who, pending.what, said)
        if short is None and "OOM killer" in said:
            short = killed(pending.who, pending.what, kernel_kills.since_start())
        raise WorkerDiedError(
            short or f"{pending.who} died during '{pending.what}': {readable(error)}"
        ) from error
    except RuntimeEnvSetupError as error:
        raise WorkerFailedError(f"{pending.who} could not be started: {readable(error)}") from error
    except RayError as error:
        health().look()
        # A task's process crashed or ran out of memory, an object's node is gone.
        short = explained(pending.who, pending.what, f"{type(error).__name__}: {readable(error)}")
        raise WorkerDiedError(
            short or f"{pending.who} was lost during '{pending.what}': {readable(error)}"
        ) from error


def _failure(pending: Pending, error: RayTaskError) -> RaytuneError:
    """The error that a worker raised, under the name it deserves."""
    if isinstance(error.cause, WorkerDiedError):  # a process that does the worker's work
        return WorkerDiedError(f"{pending.who} died during '{pending.what}': {error.cause}")
    if isinstance(error.cause, RaytuneError):
        return error.cause
    if short := explained(pending.who, pending.what, readable(error)):
        return WorkerFailedError(short)
    return WorkerFailedError(f"{pending.who} failed during '{pending.what}':\n{readable(error)}")


def readable(error: BaseException) -> str:
    """Ray's text of an error without its colours, and without the markers of frames that it left out."""
    lines = _COLOUR.sub("", str(error)).splitlines()
    return "\n".join(line for line in lines if line.strip("^~ "))


def settle(pending: Sequence[Pending]) -> tuple[list[Pending], list[Any]]:
    """Waits for all answers; work that was lost with its worker, or that hangs, is done again where that is
    allowed.

    Waiting for the first to finish rather than for the first in the list matters for a torch.distributed
    world: when one rank fails its peers block in a collective, and the useful error is not the one that is
    asked for first.

    Returns:
        What was answered in the end (`pending` itself, but for what was redone), and the answers, in order.
        Of a call with several returns the answer is the first: its small word that it is done.

    Raises:
        RaytuneError: The first failure to arrive, as in `fetch`.
    """
    current = list(pending)
    answers: list[Any] = [None] * len(current)
    owed: dict[Any, int] = {}
    until: dict[int, float] = {}

    def await_(number: int) -> None:
        owed[_first_ref(current[number])] = number
        until[number] = time.monotonic() + current[number].timeout_s

    for number in range(len(current)):
        await_(number)

    def again(number: int, loss: WorkerDiedError | DeadlineExceededError) -> None:
        redo = current[number].redo
        if redo is None:
            raise loss
        current[number] = redo(loss)
        await_(number)

    while owed:
        watches = list({current[number].watch: None for number in owed.values()})
        ready = _next_ready(owed, until, WATCHED_EVERY_S if any(watches) else math.inf)
        for watch in watches:
            if watch is not None and not ready:
                watch()
        if not ready:
            now = time.monotonic()
            late = {ref: number for ref, number in owed.items() if until[number] <= now}
            if not late:  # it came back a moment early
                continue
            error = _late(
                [current[number] for number in owed.values()], current[min(late.values())].timeout_s
            )
            for ref, number in late.items():
                del owed[ref]
                again(number, error)
        for ref in ready:
            number = owed.pop(ref)
            try:
                answers[number] = fetch(replace(current[number], ref=ref))
            except WorkerDiedError as error:
                again(number, error)
    return current, answers


def _next_ready(owed: dict[Any, int], until: dict[int, float], longest_s: float) -> list[Any]:
    """The references that are there next; none when an answer's time is up, or `longest_s` is."""
    remaining = max(min(until[number] for number in owed.values()) - time.monotonic(), 0.0)
    ready, _ = ray.wait(list(owed), num_returns=1, timeout=min(remaining, longest_s), fetch_local=False)
    return list(ready)


def _late(owed: Sequence[Pending], timeout_s: float) -> DeadlineExceededError:
    """The error that names all that are still owed."""
    late = ", ".join(f"{pending.who} ({pending.what})" for pending in owed)
    return DeadlineExceededError(
        f"No answer after {timeout_s:.0f} s from: {late}. `ray stack` shows what they are "
        "doing; a longer limit is set by --step_timeout (or --start_timeout while the actors start)."
    )


def fetch_all(pending: Sequence[Pending]) -> list[Any]:
    """Waits for all answers, in order; see `settle`."""
    done, answers = settle(pending)
    return [fetch(p) if isinstance(p.ref, list) else answer for p, answer in zip(done, answers, strict=True)]


def acknowledge(pending: Sequence[Pending]) -> list[Any]:
    """Waits for calls with several returns and reads the first of each only.

    The first is the call's small word that it is done; the others are arrays that stay in the object store.
    Not for calls that may be redone: their arrays then are where `settle` says.

    Raises:
        RaytuneError: As `settle`, and where an array found no room in the object store.
    """
    answers = settle(pending)[1]
    check_kept(pending)
    return answers


def check_kept(answered: Sequence[Pending]) -> None:
    """Looks whether the arrays of calls with several returns are in the object store. Of one that found no
    room there the error takes the place, and the call's other returns are none the worse.

    Raises:
        WorkerFailedError: One is not.
    """
    for pending in answered:
        refs = pending.ref[1:] if isinstance(pending.ref, list) else []
        if refs:  # a call's returns are told of one after another: the first says nothing of the next
            ray.wait(refs, num_returns=len(refs), timeout=pending.timeout_s, fetch_local=False)
        places = get_local_object_locations(refs)
        for ref in refs:
            place = places.get(ref, {})
            in_store = place.get("node_ids") or place.get("did_spill")
            if not in_store:  # small, or an error: it is in this process already
                fetch(replace(pending, ref=ref))


def stream(pending: Pending) -> Iterator[Any]:
    """Yields what a generator method yields, as it does; `timeout_s` is for each item.

    Raises:
        RaytuneError: As `fetch`.
    """
    for ref in stream_refs(pending):
        yield fetch(replace(pending, ref=ref))


def stream_refs(pending: Pending) -> Iterator[Any]:
    """Yields references to what a generator yields, each once it is there; `timeout_s` is for each item.

    Raises:
        DeadlineExceededError: Nothing came for so long.
    """
    items = pending.ref
    while True:
        ready, _ = ray.wait([items], timeout=pending.timeout_s, fetch_local=False)
        if not ready:
            raise DeadlineExceededError(
                f"{pending.who} gave nothing for {pending.timeout_s:.0f} s during '{pending.what}'; a longer "
                "limit is set by --step_timeout."
            )
        try:
            yield next(items)
        except StopIteration:
            return


def _first_ref(pending: Pending) -> Any:
    return pending.ref[0] if isinstance(pending.ref, list) else pending.ref
