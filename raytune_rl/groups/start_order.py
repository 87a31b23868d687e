"""In which order workers start that share GPUs: no two of them load on one GPU at the same time.

vLLM takes what is free on its device as it starts for what it will find later (0.32,
`v1/worker/gpu_worker.py`, `determine_available_memory`): while it measures, nobody else there may allocate or
free. So engines come first, one a GPU at a time, and sleep where they ever do; then the policy, the critic,
the reference, the reward models, each alone on its GPU while it loads, so that what only loading takes (a
second copy, a cast) is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raytune_rl.groups.sizes import TEACHER, Groups

ORDER = ("rollout", "policy", "critic", "reference", "reward_model")
"""Groups that hold a model, as they start on GPUs that they share; teachers are the last."""
MEETING = ("policy", "critic")
"""Groups whose ranks meet as they start: whoever begins them waits a little."""


@dataclass(frozen=True)
class Part:
    """Workers of one group that start side by side, by rank."""

    group: str
    ranks: tuple[int, ...]


Turn = tuple[Part, ...]
"""Parts that start side by side."""


class Starting(Protocol):
    """Whoever starts workers."""

    def begin(self, part: Part) -> None:
        """Starts them, and returns at once."""
        ...

    def wait(self, part: Part) -> None:
        """Waits until they have loaded."""
        ...

    def sleep(self, part: Part) -> None:
        """Makes engines give their memory back."""
        ...


def turns_of(sizes: Groups) -> list[Turn]:
    """Who starts with whom. Where nobody shares a GPU, everybody at once."""
    specs = sorted(sizes.specs, key=lambda spec: spec.name in MEETING)
    everyone = tuple(Part(spec.name, tuple(range(spec.workers))) for spec in specs)
    if not (sizes.on_gpu and sizes.colocated):
        return [everyone]
    models = [name for name in ORDER if name in sizes]
    models += [spec.name for spec in specs if spec.name.startswith(TEACHER)]
    turns = [tuple(part for part in everyone if part.group not in models)]  # they have no GPU
    gpus = sizes["policy"].workers  # worker i of every group sits beside policy rank i modulo their number
    for name in models:
        ranks = range(sizes[name].workers)
        turns += [(Part(name, tuple(ranks[first : first + gpus])),) for first in range(0, len(ranks), gpus)]
    return [turn for turn in turns if turn]


def start_in_turn(turns: Sequence[Turn], starting: Starting, sleeps: bool) -> None:
    """Starts everybody.

    Args:
        turns: From `turns_of`.
        starting: Does it.
        sleeps: Engines sleep once they have started, until it is their turn to sample.
    """
    for turn in turns:
        for part in turn:
            starting.begin(part)
        if len(turns) == 1:
            return  # nobody waits for anybody
        for part in turn:
            starting.wait(part)
            if sleeps and part.group == "rollout":
                starting.sleep(part)
