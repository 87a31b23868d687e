"""Which rows go into which micro-batch on which rank, from lengths alone.

Invariants: every row exactly once; every rank runs the same number of micro-batches, because each one is a
collective (an empty micro-batch is a dummy that must still be run); a micro-batch stays within the token
budget unless it is one unit that is longer than the budget. A unit is a row, or neighbouring rows that must
stay together, such as the sides of a pair. Micro-batches at the same position cost about the same on every
rank, because ranks wait for each other there, and whole ranks are balanced by cost.

The scheme: find how many micro-batches the budget forces, round up to a multiple of the world size, and
spread the work over that number: packed micro-batches are best-fit decreasing bins, padded ones runs of the
units sorted by length, under the lowest budget that this number allows, so that no small rest is left over.
Padded ones are also cut into the runs with the least padding, as many or a few more of them; the plan that
ends soonest is taken, when each micro-batch is charged a fixed cost.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from raytune_rl.errors import ConfigError

Layout = Literal["padded", "packed"]
MicroBatchRows = tuple[int, ...]

FIXED_COST = 0.05
"""The cost of a micro-batch however small it is (kernel launches, gradients reduced), as a share of the
budget. Rather too much, so that padding is only saved where there is plenty.
"""
MORE_RUNS = 8
"""Micro-batches of a rank beyond what the budget forces, to save padding."""
LEAST_PADDING_UP_TO = 2**23
"""Micro-batches times units times the most that one may hold: beyond it the search for the least padding
would take longer (some 20 ms) than it saves; and the more units there are, the more alike are neighbours.
"""


@dataclass(frozen=True)
class Schedule:
    """The plan of one optimizer step.

    Attributes:
        ranks: `ranks[r][k]` are the rows of micro-batch `k` on rank `r`; `()` is a dummy micro-batch.
        tokens: `tokens[r][k]` is what that micro-batch costs in tokens, padding included.
        shares: Whether micro-batches are made to be laid out with what rows have in common once
            (`data.prefix_plan`).
        saved_tokens: Tokens of rows that are then not computed again.
    """

    ranks: tuple[tuple[MicroBatchRows, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    shares: bool = False
    saved_tokens: int = 0

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches a rank, the same on every rank."""
        return len(self.ranks[0])

    @property
    def rank_tokens(self) -> tuple[int, ...]:
        """Tokens a rank, padding included."""
        return tuple(sum(costs) for costs in self.tokens)


def plan_micro_batches(
    lengths: Sequence[int] | NDArray,
    *,
    world_size: int,
    max_tokens: int,
    layout: Layout,
    max_rows: int | None = None,
    quadratic: float = 0.0,
    together: int = 1,
) -> Schedule:
    """Plans one optimizer step; deterministic.

    Args:
        lengths: Tokens of each row, all positive.
        world_size: Number of ranks.
        max_tokens: Budget of a micro-batch: rows x longest row when padded, the sum of lengths when packed. A
            longer row gets a micro-batch of its own.
        layout: How `collate` will lay the rows out.
        max_rows: At most this many rows in a micro-batch.
        quadratic: Weight `b` of the cost `sum(L + b * L**2)` by which ranks are balanced; 0 balances tokens.
            With hidden size h, attention over L tokens costs about `L / (6 h)` of the rest, so `1 / (6 * h)`
            is natural.
        together: Rows of a unit: rows k * together up to (k + 1) * together stay in one micro-batch, next to
            each other and in order.

    Raises:
        ConfigError: A budget, a row limit or a world size below 1, an unknown layout, or a row limit below a
            unit.
        ValueError: A row without tokens, or rows that are no whole number of units.
    """
    rows = np.asarray(lengths, dtype=np.int64)
    _check(rows, world_size, max_tokens, layout, max_rows, together)
    if len(rows) == 0:
        return Schedule(((),) * world_size, ((),) * world_size)
    units = rows.reshape(-1, together)
    sizes, cost = (
        together * of_rows.max(axis=1) if layout == "padded" else of_rows.sum(axis=1)
        for of_rows in (units, _row_costs(units, quadratic))
    )
    limit = len(units) if max_rows is None else max_rows // together
    pack = _sorted_runs if layout == "padded" else best_fit
    # Longest first; equal lengths keep the order of the units.
    descending = [int(unit) for unit in np.argsort(-sizes, kind="stable")]

    def bins_within(budget: int) -> list[list[int]]:
        return pack(descending, sizes, budget, limit)

    bins = bins_within(max_tokens)
    wanted = -(-len(bins) // world_size) * world_size
    evened = _split_to(_evened(bins, bins_within, wanted, max_tokens), wanted, cost, layout)
    plans = [evened]
    if layout == "padded":
        most = max(wanted, min(wanted + MORE_RUNS * world_size, len(units)))
        counts = range(wanted, most + 1, world_size)
        longest_run = min(int(_room(descending, sizes, max_tokens, limit).max()), len(units))
        if most * len(units) * longest_run <= LEAST_PADDING_UP_TO:
            runs = _least_padding(descending, sizes, cost, max_tokens, limit, counts)
            plans += [_split_to(r, count, cost, layout) for r, count in zip(runs, counts, strict=True)]
    dealt = [_deal(plan, world_size, sizes, cost, layout, together) for plan in plans]
    fixed = FIXED_COST * max_tokens
    return min(dealt, key=lambda plan: plan[0] + fixed * plan[1].n_micro_batches)[1]


def duration(plan: Schedule, max_tokens: int) -> float:
    """How long a plan takes, in tokens: of each position the costliest micro-batch of any rank, as they wait
    for each other there, and a fixed cost."""
    fixed = FIXED_COST * max_tokens
    return sum(max(costs) + fixed for costs in zip(*plan.tokens, strict=True))


def least_duration(lengths: NDArray[np.int64], world_size: int, max_tokens: int) -> float:
    """Less than any plan of rows takes that computes each of their tokens."""
    tokens = int(lengths.sum()) / world_size
    return tokens + FIXED_COST * tokens


def _check(
    sizes: NDArray[np.int64],
    world_size: int,
    max_tokens: int,
    layout: str,
    max_rows: int | None,
    together: int,
) -> None:
    if layout not in ("padded", "packed"):
        raise ConfigError(f"layout is {layout!r}; it is 'padded' or 'packed'")
    for name, value in (("world_size", world_size), ("max_tokens", max_tokens), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; a micro-batch needs at least 1")
    if max_rows is not None and max_rows < together:
        raise ConfigError(f"max_rows is {max_rows}, but {together} rows must stay together")
    if len(sizes) % together:
        raise ValueError(f"{len(sizes)} rows are no whole number of units of {together}")
    if len(sizes) and sizes.min() < 1:
        raise ValueError(
            f"row {int(sizes.argmin())} has {int(sizes.min())} tokens; every row needs at least one"
        )


def _sorted_runs(descending: list[int], sizes: NDArray[np.int64], budget: int, limit: int) -> list[list[int]]:
    """Consecutive runs of the rows sorted by length: the first row of a run is its width."""
    bins: list[list[int]] = []
    room = 0
    for row in descending:
        if room == 0:
            bins.append([])
            room = min(max(budget // int(sizes[row]), 1), limit)
        bins[-1].append(row)
        room -= 1
    return bins


def _least_padding(
    descending: list[int],
    sizes: NDArray[np.int64],
    cost: NDArray[np.float64],
    budget: int,
    limit: int,
    counts: Sequence[int],
) -> list[list[list[int]]]:
    """For each of the counts, in ascending order, the runs of the sorted units that cost least together, so
    many or fewer (dynamic programme)."""
    n_units = len(descending)
    room = np.minimum(_room(descending, sizes, budget, limit), n_units)
    most = int(room.max())
    taken = np.arange(most, 0, -1)  # units of a run that ends before j
    first = np.arange(n_units + 1)[:, None] - taken  # where it begins, by j
    allowed = (first >= 0) & (taken <= room[first.clip(0, n_units - 1)])
    run_cost = np.where(allowed, cost[descending][first.clip(0, n_units - 1)] * taken, np.inf)
    best = np.full(most + n_units + 1, np.inf)  # up to j, behind what lies before the first unit
    best[most] = 0.0
    begins: list[NDArray[np.int64]] = []
    for _ in range(counts[-1]):
        reached = sliding_window_view(best, most)[: n_units + 1] + run_cost
        chosen = reached.argmin(axis=1)
        begins.append(first[:, 0] + chosen)
        best[most + 1 :] = np.take_along_axis(reached, chosen[:, None], axis=1)[1:, 0]
    return [_traced(descending, begins[:count]) for count in counts]


def _room(descending: list[int], sizes: NDArray[np.int64], budget: int, limit: int) -> NDArray[np.int64]:
    """How many units a run may have that begins with each."""
    return np.minimum(np.maximum(budget // sizes[descending], 1), limit)


def _traced(descending: list[int], begins: list[NDArray[np.int64]]) -> list[list[int]]:
    """The runs, from where the last of them begins, and the one before it, and so on."""
    runs: list[list[int]] = []
    end = len(descending)
    for begin in reversed(begins):
        if end:
            start = int(begin[end])
            runs.append(descending[start:end])
            end = start
    return runs


def best_fit(descending: list[int], sizes: NDArray[np.int64], budget: int, limit: int) -> list[list[int]]:
    """Best-fit decreasing: each row goes to the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in descending:
        size = int(sizes[row])
        at = bisect_left(open_bins, (size, -1))
        if at < len(open_bins):
            left, target = open_bins.pop(at)
            bins[target].append(row)
        else:
            left, target = max(budget, size), len(bins)
            bins.append([row])
        if left > size and len(bins[target]) < limit:
            insort(open_bins, (left - size, target))
    return bins


def _evened(
    bins: list[list[int]], bins_within: Callable[[int], list[list[int]]], wanted: int, max_tokens: int
) -> list[list[int]]:
    """The bins under the smallest budget that still needs no more than `wanted` of them (binary search)."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        candidate = bins_within(middle)
        if len(candidate) <= wanted:
            bins, high = candidate, middle
        else:
            low = middle + 1
    return bins


def _row_costs(lengths: NDArray[np.int64], quadratic: float) -> NDArray[np.float64]:
    tokens = lengths.astype(np.float64)
    return tokens + quadratic * tokens**2


def _split_to(
    bins: list[list[int]], wanted: int, cost: NDArray[np.float64], layout: Layout
) -> list[list[int]]:
    """Halves the costliest bins until there are `wanted`; empty bins make up for what cannot be split."""
    heap = [(-float(cost[rows].sum()), order, rows) for order, rows in enumerate(bins)]
    heapq.heapify(heap)
    done: list[list[int]] = []
    serial = len(bins)
    while heap and len(heap) + len(done) < wanted:
        _, _, rows = heapq.heappop(heap)
        if len(rows) == 1:
            done.append(rows)
            continue
        # A padded bin is cut in two runs, which pads least; a packed one is dealt out, which balances its
        # halves.
        middle = (len(rows) + 1) // 2
        halves = (rows[:middle], rows[middle:]) if layout == "padded" else (rows[0::2], rows[1::2])
        for half in halves:
            heapq.heappush(heap, (-float(cost[half].sum()), serial, half))
            serial += 1
    result = done + [rows for _, _, rows in heap]
    return result + [[] for _ in range(wanted - len(result))]


def _deal(
    bins: list[list[int]],
    world_size: int,
    sizes: NDArray[np.int64],
    cost: NDArray[np.float64],
    layout: Layout,
    together: int,
) -> tuple[float, Schedule]:
    """Deals bins of like cost to the ranks in rounds; in each round the least loaded rank takes the
    costliest.

    Returns:
        How long it takes, as the cost of the costliest bin of each round, and the plan.
    """

    def tokens_of(units: list[int]) -> int:
        if not units:
            return 0
        return int(sizes[units].max()) * len(units) if layout == "padded" else int(sizes[units].sum())

    def cost_of(units: list[int]) -> float:
        if not units:
            return 0.0
        return float(cost[units].max()) * len(units) if layout == "padded" else float(cost[units].sum())

    costliest_first = sorted(bins, key=lambda units: (-cost_of(units), min(units, default=len(sizes))))
    load = [0.0] * world_size
    ranks: list[list[MicroBatchRows]] = [[] for _ in range(world_size)]
    tokens: list[list[int]] = [[] for _ in range(world_size)]
    for start in range(0, len(costliest_first), world_size):
        by_load = sorted(range(world_size), key=lambda rank: (load[rank], rank))
        for rank, units in zip(by_load, costliest_first[start : start + world_size], strict=True):
            load[rank] += cost_of(units)
            ranks[rank].append(tuple(u * together + k for u in sorted(units) for k in range(together)))
            tokens[rank].append(tokens_of(units))
    duration = sum(cost_of(units) for units in costliest_first[::world_size])
    return duration, Schedule(tuple(map(tuple, ranks)), tuple(map(tuple, tokens)))
