"""The order of the data: a pure function of seed and epoch, so that a position in it is one integer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytune_rl.errors import ConfigError


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

    def batch(self, number: int) -> NDArray[np.int64]:
        """Indices of batch `number`, counted from 0 over all epochs, int64 `[batch_size]`."""
        epoch, within = divmod(number, self.batches_per_epoch)
        indices = order(self.n, epoch, self.seed, self.shuffle)
        return indices[within * self.batch_size : (within + 1) * self.batch_size]

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Indices from position `start` to before `stop` of an epoch, int64."""
        return order(self.n, epoch, self.seed, self.shuffle)[start:stop]

    @property
    def units(self) -> int:
        """What `part` counts in an epoch: indices."""
        return self.n

    def dropped(self, epoch: int) -> NDArray[np.int64]:
        """Indices that the epoch leaves out."""
        indices = order(self.n, epoch, self.seed, self.shuffle)
        return indices[self.batches_per_epoch * self.batch_size :]
