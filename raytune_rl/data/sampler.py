"""The order of the data: a pure function of seed and epoch, so that a position in it is one integer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.errors import CheckpointError, ConfigError


def order(n: int, epoch: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """The `n` indices in the order of an epoch (numbered from 0), int64 `[n]`."""
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(n).astype(np.int64)


def stretch(n: int, start: int, count: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """`count` indices from position `start` of all epochs laid end to end, int64 `[count]`."""
    found = [
        order(n, epoch, seed, shuffle)[max(start - epoch * n, 0) : start + count - epoch * n]
        for epoch in range(start // n, (start + count - 1) // n + 1)
    ]
    return np.concatenate([*found, np.empty(0, dtype=np.int64)])


@dataclass(frozen=True)
class BatchPlan:
    """Batches of indices over epochs; batch `k` can be computed without the ones before it.

    Attributes:
        n: Number of prompts or rows.
        batch_size: Indices in a batch.
        seed, shuffle: As in `order`.
        drop_last: Leave out the incomplete last batch of each epoch, as ms-swift does in GRPO. `dropped`
            names what was left out. Otherwise that batch is shorter.
    """

    n: int
    batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"a batch of {self.batch_size} prompts is impossible; it needs at least 1")
        if self.n < 1:
            raise ConfigError("there are no prompts to make batches of")
        if self.drop_last and self.n < self.batch_size:
            raise ConfigError(
                f"a step takes {self.batch_size} prompts but the data set has {self.n}: no step would run. "
                "Lower the batch size, raise num_generations, or repeat the data with `#N` after its path"
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def total_batches(self, epochs: float) -> int:
        """Batches in `epochs` epochs; a fraction of an epoch counts up to whole batches."""
        return math.ceil(self.batches_per_epoch * epochs)

    def epoch_of(self, batch: int) -> int:
        return batch // self.batches_per_epoch

    def batch(self, number: int) -> NDArray[np.int64]:
        """Indices of batch `number`, counted from 0 over all epochs, int64 `[batch_size]`."""
        epoch, within = divmod(number, self.batches_per_epoch)
        indices = order(self.n, epoch, self.seed, self.shuffle)
        return indices[within * self.batch_size : (within + 1) * self.batch_size]

    def dropped(self, epoch: int) -> NDArray[np.int64]:
        """Indices that the epoch leaves out."""
        indices = order(self.n, epoch, self.seed, self.shuffle)
        return indices[self.batches_per_epoch * self.batch_size :]


class PromptStream:
    """A cursor over a `BatchPlan`; its whole state is how many batches it has given out."""

    def __init__(self, plan: BatchPlan, *, total_batches: int | None = None, position: int = 0) -> None:
        """`total_batches` ends the stream; None lets it run over epochs for ever."""
        self.plan = plan
        self.total_batches = total_batches
        self.position = position
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> float:
        """Epochs given out so far, with the fraction of the present one."""
        return self.position / self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return self

    def __next__(self) -> NDArray[np.int64]:
        if self.total_batches is not None and self.position >= self.total_batches:
            raise StopIteration
        epoch, within = divmod(self.position, self.plan.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = order(self.plan.n, epoch, self.plan.seed, self.plan.shuffle)
        self.position += 1
        return self._order[within * self.plan.batch_size : (within + 1) * self.plan.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """The position, and the plan it belongs to."""
        return {"position": self.position, "plan": asdict(self.plan)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            CheckpointError: The data or the batch arithmetic differ, so the position would mean other
                prompts.
        """
        saved, mine = dict(state["plan"]), asdict(self.plan)
        differing = [
            f"{name} was {saved.get(name)!r}, now {mine[name]!r}"
            for name in mine
            if saved.get(name) != mine[name]
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint's data position belongs to another order: {'; '.join(differing)}. "
                "Resume with the same data and settings, or start anew"
            )
        self.position = int(state["position"])
