"""Micro-batches of rows that begin alike: what they share is counted once, and computed once.

The unit is a part of a group: some of its rows, and once the tokens that they have in common. A group is one
part where the budget and the number of ranks allow it, and several where they do not; each then carries the
common tokens again. Parts are dealt to micro-batches and ranks as packed rows are.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.microbatch import (
    Layout,
    Schedule,
    duration,
    least_duration,
    plan_micro_batches,
)
from raytune_rl.protocol.model import Settled, Sharing
from raytune_rl.protocol.rows import Prefixes

STRETCH = 1.25
"""How much longer a part may be than the longest of its rows where that row alone is over the budget, and so
has to fit into memory anyway: or long prompts would share nothing."""


@dataclass(frozen=True)
class Budget:
    """What micro-batches must keep to.

    Attributes:
        world_size: Number of ranks.
        max_tokens: Of a micro-batch.
        layout: Of rows that share nothing.
        sharing: "true": rows share what they can; "auto": where that is soonest done; "false": never.
        together: Rows that must stay in one micro-batch, see `plan_micro_batches`.
    """

    world_size: int
    max_tokens: int
    layout: Layout
    sharing: Sharing = "false"
    together: int = 1

    @classmethod
    def of(cls, settled: Settled, world_size: int, max_tokens: int, together: int = 1) -> Budget:
        """For a model whose rows are laid out as was settled."""
        return cls(world_size, max_tokens, settled.layout, settled.sharing, together)  # type: ignore[arg-type]


def plan_step(lengths: NDArray[np.int64], prefixes: Prefixes | None, budget: Budget) -> Schedule:
    """Plans one optimizer step, with what rows share computed once where that pays; deterministic.

    Args:
        lengths: Tokens of each row, int64 `[n]`.
        prefixes: Which rows begin alike; None: it is not known of any.
        budget: See there.

    Raises:
        ConfigError, ValueError: As `plan_micro_batches`.
    """

    def without() -> Schedule:
        return plan_micro_batches(
            lengths,
            world_size=budget.world_size,
            max_tokens=budget.max_tokens,
            layout=budget.layout,
            together=budget.together,
        )

    if prefixes is None or budget.sharing == "false":
        return without()
    if len(np.unique(prefixes.groups)) == len(lengths):
        return without()  # nobody to share with, or no rows at all
    shared = plan_shared(lengths, prefixes, budget)
    if not shared.saved_tokens:
        return without()
    if budget.sharing == "true":
        return shared
    took = duration(shared, budget.max_tokens)
    if took <= least_duration(lengths, budget.world_size, budget.max_tokens):
        return shared  # whatever the other plan is
    plain = without()
    return shared if took <= duration(plain, budget.max_tokens) else plain


def plan_shared(lengths: NDArray[np.int64], prefixes: Prefixes, budget: Budget) -> Schedule:
    """The plan in which rows share all that they can: of those that cut groups into ever more parts the one
    that ends soonest."""
    rows = np.asarray(lengths, dtype=np.int64)
    groups = _groups(rows, prefixes, budget.together)
    plans = []
    # Halves fill micro-batches better; fewer groups than ranks need as many parts as there are ranks.
    for pieces in sorted({1, 2, *(-(-k * budget.world_size // len(groups)) for k in (1, 2))}):
        parts = [part for group in groups for part in group.parts(budget.max_tokens, pieces)]
        sizes = np.array([part.tokens for part in parts], dtype=np.int64)
        dealt = plan_micro_batches(
            sizes, world_size=budget.world_size, max_tokens=budget.max_tokens, layout="packed"
        )
        plans.append(_of_rows(dealt, parts, int(rows.sum())))
    return min(plans, key=lambda plan: duration(plan, budget.max_tokens))


@dataclass(frozen=True)
class _Part:
    """Some rows of a group, and what they have in common."""

    rows: tuple[int, ...]
    prefix: int
    own: int
    group: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.own


@dataclass(frozen=True)
class _Group:
    """Units of rows that have `prefix` leading tokens in common, and how many each unit has beyond them."""

    units: tuple[tuple[int, ...], ...]
    prefix: int
    own: tuple[int, ...]
    longest: int

    def parts(self, max_tokens: int, pieces: int) -> Iterator[_Part]:
        """The group in at least so many parts, each within the budget if it can be."""
        limit = max_tokens if self.longest <= max_tokens else int(STRETCH * self.longest)
        room = max(limit - self.prefix, max(self.own))
        count = min(max(pieces, -(-sum(self.own) // room)), len(self.units))
        while True:
            dealt = self._dealt(count)
            if count == len(self.units) or all(sum(self.own[u] for u in part) <= room for part in dealt):
                break
            count += 1
        for part in dealt:
            rows = tuple(row for unit in part for row in self.units[unit])
            yield _Part(rows, self.prefix, sum(self.own[unit] for unit in part), self.units[0][0])

    def _dealt(self, count: int) -> list[list[int]]:
        """The units in `count` parts of about the same size: the longest first, each to the least full."""
        parts: list[list[int]] = [[] for _ in range(count)]
        load = [(0, part) for part in range(count)]
        for unit in sorted(range(len(self.units)), key=lambda unit: (-self.own[unit], unit)):
            filled, part = heapq.heappop(load)
            parts[part].append(unit)
            heapq.heappush(load, (filled + self.own[unit], part))
        return [sorted(part) for part in parts if part]


def _groups(rows: NDArray[np.int64], prefixes: Prefixes, together: int) -> list[_Group]:
    members: dict[int, list[int]] = {}
    for unit, group in enumerate(prefixes.groups[::together].tolist()):
        members.setdefault(group, []).append(unit)
    found = []
    for units in members.values():
        of_units = [tuple(range(unit * together, (unit + 1) * together)) for unit in units]
        flat = [row for unit in of_units for row in unit]
        # As the collator does it: every row keeps a token of its own.
        prefix = min(int(prefixes.lengths[flat].min()), int(rows[flat].min()) - 1)
        if len(flat) == 1 or prefix < 1:
            found += [
                _Group((unit,), 0, (int(rows[list(unit)].sum()),), int(rows[list(unit)].max()))
                for unit in of_units
            ]
            continue
        own = tuple(int((rows[list(unit)] - prefix).sum()) for unit in of_units)
        found.append(_Group(tuple(of_units), prefix, own, int(rows[flat].max())))
    return found


def _of_rows(dealt: Schedule, parts: Sequence[_Part], row_tokens: int) -> Schedule:
    """A plan of parts as one of rows. Parts of one group that meet in a micro-batch are one there."""
    micro_batches = [[[parts[number] for number in micro] for micro in rank] for rank in dealt.ranks]
    rows = tuple(
        tuple(tuple(sorted(row for part in micro for row in part.rows)) for micro in rank)
        for rank in micro_batches
    )
    tokens = tuple(tuple(_tokens(micro) for micro in rank) for rank in micro_batches)
    return Schedule(rows, tokens, shares=True, saved_tokens=row_tokens - sum(map(sum, tokens)))


def _tokens(parts: Sequence[_Part]) -> int:
    prefixes = {part.group: part.prefix for part in parts}
    return sum(part.own for part in parts) + sum(prefixes.values())
