"""Waiting for actors: every wait has a deadline, every failure has a name.

All `ray.get` calls of the controllers go through `fetch`, so that no error of Ray's reaches a user unnamed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raytune_rl.errors import DeadlineExceededError, RaytuneError, WorkerDiedError, WorkerFailedError


@dataclass(frozen=True)
class Pending:
    """An answer that is awaited.

    Attributes:
        ref: What Ray promised: one reference, or a list of them for a call with several returns.
        who: The actor, as a person would name it ("rollout[1]").
        what: The work asked for ("generate 32 completions").
        timeout_s: Seconds from the moment of waiting.
    """

    ref: Any
    who: str
    what: str
    timeout_s: float


def fetch(pending: Pending) -> Any:
    """Waits for one answer.

    Raises:
        DeadlineExceededError: No answer within `timeout_s`.
        WorkerDiedError: The actor ended while it was working.
        WorkerFailedError: The call raised inside the actor. An error that is a `RaytuneError` already keeps
            its class.
    """
    try:
        return ray.get(pending.ref, timeout=pending.timeout_s)
    except GetTimeoutError as error:
        raise DeadlineExceededError(
            f"{pending.who} did not finish '{pending.what}' within {pending.timeout_s:.0f} s. "
            "It may hang or only be slow: `ray stack` shows what it is doing; a longer limit is set by "
            "--step_timeout."
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RaytuneError):
            raise cause from None
        raise WorkerFailedError(f"{pending.who} failed during '{pending.what}':\n{error}") from error
    except RayActorError as error:
        raise WorkerDiedError(f"{pending.who} died during '{pending.what}': {error}") from error


def fetch_all(pending: Sequence[Pending]) -> list[Any]:
    """Waits for all answers, in order; the first failure to arrive is raised at once, whichever it is.

    Waiting for the first to finish rather than for the first in the list matters for a torch.distributed
    world: when one rank fails its peers block in a collective, and the useful error is not the one that is
    asked for first.
    """
    for done in as_completed(pending):
        fetch(done)
    return [fetch(p) for p in pending]


def acknowledge(pending: Sequence[Pending]) -> list[Any]:
    """Waits for calls with several returns and reads the first of each only.

    The first is the call's small word that it is done; the others are arrays that stay in the object store.
    """
    return fetch_all([replace(p, ref=p.ref[0]) for p in pending])


def as_completed(pending: Sequence[Pending]) -> Iterator[Pending]:
    """Yields answers as they become available (finished or failed).

    Raises:
        DeadlineExceededError: When an answer's time is up, naming all that are still owed.
    """
    owed = {_first_ref(p): p for p in pending}
    started = time.monotonic()
    while owed:
        remaining = min(p.timeout_s for p in owed.values()) - (time.monotonic() - started)
        ready, _ = ray.wait(list(owed), num_returns=1, timeout=max(remaining, 0.0), fetch_local=False)
        if not ready:
            late = ", ".join(f"{p.who} ({p.what})" for p in owed.values())
            waited = time.monotonic() - started
            raise DeadlineExceededError(
                f"No answer after {waited:.0f} s from: {late}. `ray stack` shows what they are doing; a "
                "longer limit "
                "is set by --step_timeout (or --start_timeout while the actors start)."
            )
        for ref in ready:
            yield owed.pop(ref)


def _first_ref(pending: Pending) -> Any:
    return pending.ref[0] if isinstance(pending.ref, list) else pending.ref
