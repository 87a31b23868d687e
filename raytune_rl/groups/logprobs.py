"""Log-probs of rows by whoever can give them: the policy, or frozen models such as the reference of the
KL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.groups.world import rank_share
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import RowLogprobs
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch_all, settle


@dataclass(frozen=True)
class Asked:
    """Workers that were asked about rows, each about its share: they tell something of it, and give columns.

    Attributes:
        calls: The questions.
        shares: The rows that each is about.
    """

    calls: list[Pending]
    shares: list[list[int]]

    def answers(self) -> tuple[list[RowPointer], list[tuple[list[int], Any]]]:
        """Where each row's columns lie, in the order of rows; and by share the rows and what was told."""
        columns: dict[int, RowPointer] = {}
        done, told = settle(self.calls)
        for call, rows in zip(done, self.shares, strict=True):
            columns |= {row: RowPointer(call.ref[1], number) for number, row in enumerate(rows)}
        return [columns[row] for row in range(len(columns))], list(zip(self.shares, told, strict=True))


def ask_about(
    group: WorkerGroup,
    rows: TrainBatch,
    budget: Budget,
    method: str,
    *settings: Any,
    what: str,
    collective: bool = False,
) -> Asked:
    """Asks workers about rows, the work balanced by tokens.

    Args:
        group: Who is asked.
        rows: With the columns that are read.
        budget: Of a micro-batch.
        method: What the workers call it; it has two results.
        settings: Further arguments of it.
        what: The work as a person would name it, before "N rows".
        collective: Every worker must take part even without rows (a sharded model).
    """
    schedule = plan_step(rows.lengths, rows.prefixes, budget)
    asked = Asked([], [])
    for rank in range(len(group)):
        share = rank_share(schedule, rank, rows)
        if share.rows or collective:
            named = f"{what} {len(share.rows)} rows"
            asked.calls.append(group.submit(rank, method, share.batch, *settings, what=named, returns=2))
            asked.shares.append(share.rows)
    return asked


def score_rows(
    group: WorkerGroup,
    batch: TrainBatch,
    max_tokens: int,
    settled: Settled,
    *,
    collective: bool = False,
    method: str = "logprobs",
) -> RowLogprobs:
    """Log-probs of rows by any group that can score, the work balanced by tokens.

    Args:
        group: Policy or reference.
        batch: The rows. Of its columns the media alone are read.
        max_tokens: Token budget of a micro-batch.
        settled: How rows are laid out.
        collective: Every worker must take part even without rows (a sharded model).
        method: What the workers call it.
    """
    rows = batch.keep({ROW_COLUMN}).without_scalars()
    budget = Budget.of(settled, len(group), max_tokens)
    asked = ask_about(group, rows, budget, method, what="log-probs of", collective=collective)
    columns, told = asked.answers()
    sums = np.empty(len(batch))
    for own, answer in told:
        sums[own] = answer
    return RowLogprobs(columns, sums)


class Reference(Protocol):
    """Gives log-probs of rows under the model that the KL refers to."""

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of every row."""
        ...


class BasePolicy(Protocol):
    """A policy that can put its adapter off."""

    def base_logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of every row under the model without it."""
        ...


class AdapterOff:
    """The policy's own model without its LoRA adapter, which is what it started from: no second copy.

    Args:
        policy: Whose adapter was new when the run began.
    """

    def __init__(self, policy: BasePolicy) -> None:
        self._policy = policy

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of every row."""
        return self._policy.base_logprobs(batch)


class Moves:
    """What a copy that is started anew must be told to be as the others, which have moved.

    The weights after a move are kept in the object store, where the driver owns them.

    Args:
        group: The copies.
        start_timeout_s: Deadline of a start.
        tell: Told of each loss.
    """

    def __init__(self, group: WorkerGroup, start_timeout_s: float, tell: Callable[[str, str], None]) -> None:
        self._group, self._start_timeout_s, self._tell = group, start_timeout_s, tell
        self._now: dict[str, tuple[Any, ...]] = {}

    def loaded(self, directory: Path) -> None:
        """All are what a checkpoint says."""
        self._become({"load": (str(directory),)})

    def mixed(self, manifest: Manifest, share: float) -> None:
        """All have moved towards a version. Who is lost before the new weights are kept moves from the old
        ones."""
        self._become({**self._now, "mix": (manifest, share)})
        (kept,) = settle(
            [self._group.submit(0, "weights", what="keeping the weights of a model that moves", returns=2)]
        )[0]
        self._become({"become": (kept.ref[1],)})

    def _become(self, now: dict[str, tuple[Any, ...]]) -> None:
        self._now = now
        self._group.replace_lost(self._start_timeout_s, self._tell, now)


class ReferenceGroup:
    """M copies that answer as one.

    Args:
        group: The started workers.
        max_tokens: Token budget of a micro-batch.
        settled: How rows are laid out.
    """

    def __init__(self, group: WorkerGroup, max_tokens: int, settled: Settled) -> None:
        self.workers = group
        self._max_tokens = max_tokens
        self._settled = settled

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of every row."""
        return score_rows(self.workers, batch, self._max_tokens, self._settled)

    def offload(self, weights: bool) -> None:
        """Gives back what the allocators keep, and moves the weights to the CPU if they are wanted away."""
        self.workers.call("offload", weights, what="offloading the reference")

    def reload(self) -> None:
        """Brings them back."""
        self.workers.call("reload", what="reloading the reference")


class Follower:
    """Copies of a model that follows the policy: now and then its weights move towards the policy's.

    Args:
        name: Folder of a checkpoint with its weights.
        group: The copies.
        every: Optimizer steps between two moves.
        share: The policy's share in the mixture.
        start_timeout_s: Deadline of the start of a copy in the place of a lost one.
        tell: Told of each loss.
    """

    def __init__(
        self,
        name: str,
        group: WorkerGroup,
        every: int,
        share: float,
        start_timeout_s: float,
        tell: Callable[[str, str], None],
    ) -> None:
        self.name, self.every, self._group, self._share = name, every, group, share
        self._moves = Moves(group, start_timeout_s, tell)

    def mix(self, manifest: Manifest) -> None:
        """Every copy moves its weights towards those of a published version."""
        self._group.call("mix", manifest, self._share, what=f"mixing the policy into the {self.name}")
        self._moves.mixed(manifest, self._share)

    def save(self, directory: Path) -> None:
        """Writes the weights of one copy: all are the same."""
        fetch_all([self._group.submit(0, "save", str(directory), what=f"saving the {self.name}")])

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, in every copy."""
        self._group.call("load", str(directory), what=f"restoring the {self.name}")
        self._moves.loaded(directory)
