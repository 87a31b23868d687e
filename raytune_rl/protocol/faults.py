"""What was lost in a run, and what was done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A worker, or a world of them, that was lost and is there again.

    Attributes:
        when: Seconds since the epoch, UTC.
        group: Role of the lost one, such as "policy".
        who: It, as a person would name it: "policy[1]".
        phase: What was asked of it: "training step 5".
        loss: What happened, a sentence.
        remedy: What was done about it, a sentence.
        recovered_s: From the notice of the loss until the work could go on, seconds; None where the run goes
            on meanwhile.
        repeated: Work that was done again, beside the call itself: "2 optimizer steps"; empty for none.
    """

    when: float
    group: str
    who: str
    phase: str
    loss: str
    remedy: str = ""
    recovered_s: float | None = None
    repeated: str = ""


Tell = Callable[[Fault], None]
"""Takes a fault: at once when it is noticed (without `recovered_s`), or when it is over."""
