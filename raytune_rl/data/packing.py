"""Packing: rows put together into packs of a fixed number of tokens, and batches counted in packs.

Best-fit decreasing, planned anew for each epoch from lengths, seed and epoch alone, so that any step's rows
can be found from its number. How many packs there are depends on the lengths only: every epoch has as many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.microbatch import best_fit
from raytune_rl.data.sampler import order
from raytune_rl.errors import ConfigError


@dataclass
class Packs:
    """The packs of every epoch.

    Attributes:
        lengths: Tokens of each row, int64 `[n]`.
        capacity: Tokens a pack may hold. A longer row is a pack of its own.
        seed, shuffle: As in `sampler.order`.
    """

    lengths: NDArray[np.int64]
    capacity: int
    seed: int
    shuffle: bool = True
    _planned: tuple[int, list[list[int]]] = field(default=(-1, []), init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"a pack of {self.capacity} tokens is impossible; it needs at least 1")
        self._count = len(self.epoch(0))

    def __len__(self) -> int:
        """Packs in an epoch."""
        return self._count

    def epoch(self, number: int) -> list[list[int]]:
        """The row numbers of each pack, in the order of an epoch (from 0). Every row is in one pack."""
        if self._planned[0] != number:
            self._planned = (number, self._plan(number))
        return self._planned[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        rows = order(len(self.lengths), epoch, self.seed, self.shuffle)
        longest_first = rows[np.argsort(-self.lengths[rows], kind="stable")].tolist()
        packs = best_fit(longest_first, self.lengths, self.capacity, len(rows))
        # Packs come out longest row first: without another shuffle the long rows would all be learned early.
        return [packs[i] for i in order(len(packs), epoch, self.seed, True)] if self.shuffle else packs


@dataclass(frozen=True)
class PackBatches:
    """Batches of packs over epochs; batch `k` can be found without the ones before it.

    Attributes:
        packs: The packs.
        batch_size: Packs in a batch; the last batch of an epoch may hold fewer.
    """

    packs: Packs
    batch_size: int

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.packs) // self.batch_size)

    def batch(self, number: int) -> NDArray[np.int64]:
        """The row numbers in batch `number`, counted from 0 over all epochs, int64."""
        epoch, within = divmod(number, self.batches_per_epoch)
        return self.part(epoch, within * self.batch_size, (within + 1) * self.batch_size)

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The row numbers in the packs from `start` to before `stop` of an epoch, int64."""
        chosen = self.packs.epoch(epoch)[start:stop]
        return np.concatenate([np.empty(0, np.int64), *(np.asarray(pack, dtype=np.int64) for pack in chosen)])

    @property
    def units(self) -> int:
        """What `part` counts in an epoch: packs."""
        return len(self.packs)
