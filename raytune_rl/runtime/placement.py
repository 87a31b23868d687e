"""Where actors go: pure arithmetic on resources, and the one place that asks Ray for them.

A *bundle* is a share of one node. Workers of different groups that are colocated share a bundle (and its
GPU); all others have one of their own. The bundles of a run form one Ray placement group, so a run starts
whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.errors import PlacementError


@dataclass(frozen=True)
class GroupSpec:
    """The needs of a group of workers of one role.

    Attributes:
        name: Role name, such as "policy".
        workers: Number of actors.
        cpus: CPU cores of each, may be fractional.
        gpus: GPUs of each, may be fractional when the group shares them.
        colocate_with: Name of an earlier group whose bundles this one shares (worker i with worker i modulo
            its size).
        resources: Custom Ray resources of each, such as `{"policy": 1}`.
        per_node: As many on each of `workers / per_node` nodes; None: wherever there is room.
    """

    name: str
    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    colocate_with: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    per_node: int | None = None

    def demand(self) -> dict[str, float]:
        """Resources of one worker, in Ray's names."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}


@dataclass(frozen=True)
class Layout:
    """Bundles to reserve and the bundle index of each worker of each group.

    Attributes:
        bundles: Resources of each.
        bundle_of: By group.
        blocks: Of each group that has so many workers a node: its bundles by node. Those of a block lie on
            one node, and no two blocks of a group on the same.
    """

    bundles: tuple[dict[str, float], ...]
    bundle_of: dict[str, tuple[int, ...]]
    blocks: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Node:
    """A node as Ray knows it; several may have one address, where one machine plays many."""

    address: str
    node_id: str

    def order(self) -> tuple[Any, ...]:
        """Sorts nodes by address, numbers as numbers: 10.0.0.9 before 10.0.0.10."""
        parts = self.address.split(".")
        numbers = tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
        return not numbers, numbers, self.address, self.node_id


@dataclass(frozen=True)
class Slot:
    """One worker's reserved place."""

    placement_group: Any
    bundle_index: int
    node: Node


def make_layout(groups: Sequence[GroupSpec]) -> Layout:
    """Distributes the workers of all groups over bundles.

    A bundle that groups share takes whole GPUs: Ray adds fractions up over a node's GPUs, and would count
    two bundles of 0.7 on it as 1.4 GPUs although no GPU can hold both.

    Raises:
        PlacementError: A group is colocated with one that does not come before it.
        ValueError: Workers that shall be so many a node do not fill their nodes.
    """
    bundles: list[dict[str, float]] = []
    bundle_of: dict[str, tuple[int, ...]] = {}
    shared: set[int] = set()
    blocks: list[tuple[tuple[int, ...], ...]] = []
    for group in groups:
        if group.per_node is not None and group.workers % group.per_node:
            raise ValueError(f"{group.workers} {group.name} workers are not a multiple of {group.per_node}")
        if group.colocate_with is None:
            first = len(bundles)
            bundles.extend(dict(group.demand()) for _ in range(group.workers))
            own_hosts = tuple(range(first, first + group.workers))
            bundle_of[group.name] = own_hosts
            if group.per_node is not None:
                starts = range(0, group.workers, group.per_node)
                blocks.append(tuple(own_hosts[start : start + group.per_node] for start in starts))
            continue
        if group.colocate_with not in bundle_of:
            raise PlacementError(
                f"group {group.name!r} is colocated with {group.colocate_with!r}, which is not placed before "
                "it"
            )
        hosts = bundle_of[group.colocate_with]
        shared |= set(hosts)
        own_hosts = tuple(hosts[i % len(hosts)] for i in range(group.workers))
        bundle_of[group.name] = own_hosts
        for index in own_hosts:
            for name, amount in group.demand().items():
                bundles[index][name] = round(bundles[index].get(name, 0.0) + amount, 6)
    for index in shared:
        if "GPU" in bundles[index]:
            bundles[index]["GPU"] = float(math.ceil(bundles[index]["GPU"] - 1e-6))
    return Layout(tuple(bundles), bundle_of, tuple(blocks))


def check_fits(
    layout: Layout, groups: Sequence[GroupSpec], nodes: Mapping[str, Mapping[str, float]]
) -> dict[int, str]:
    """Refuses at once what the cluster can never place, by packing the largest bundles first.

    Args:
        layout: What to place.
        groups: For the message.
        nodes: Available resources by node name (Ray's names: CPU, GPU, custom).

    Returns:
        The node of each bundle that may not lie anywhere else: those of groups of so many workers a node.

    Raises:
        PlacementError: With what was asked for and what each node has.
    """
    pinned, homeless = _settle(layout, nodes)
    if homeless is not None:
        raise PlacementError(placement_message(homeless, groups, nodes))
    return pinned


def find_homeless(layout: Layout, nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """The first bundle, or block of them, that finds no room on any node, or None if all do."""
    return _settle(layout, nodes)[1]


def _settle(
    layout: Layout, nodes: Mapping[str, Mapping[str, float]]
) -> tuple[dict[int, str], dict[str, float] | None]:
    """Nodes of the bundles that are bound to one, and what found no room."""
    free = {name: dict(have) for name, have in nodes.items()}

    def settle(wanted: Mapping[str, float], among: Collection[str]) -> str | None:
        home = next((n for n in free if n in among and _holds(free[n], wanted)), None)
        if home is not None:
            for name, amount in wanted.items():
                free[home][name] -= amount
        return home

    pinned: dict[int, str] = {}
    summed = [
        [(block, sum_of(layout.bundles[i] for i in block)) for block in group] for group in layout.blocks
    ]
    for group in sorted(summed, key=lambda blocks: _demanding(blocks[0][1]), reverse=True):
        untaken = set(free)
        for block, wanted in group:
            home = settle(wanted, untaken)
            if home is None:
                return pinned, wanted
            untaken.remove(home)
            pinned |= dict.fromkeys(block, home)
    # What only some nodes have is given out first, as Ray does, or the undemanding would sit in its place.
    others = [bundle for index, bundle in enumerate(layout.bundles) if index not in pinned]
    for bundle in sorted(others, key=_demanding, reverse=True):
        if settle(bundle, free) is None:
            return pinned, bundle
    return pinned, None


def sum_of(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Resources of several bundles together."""
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def placement_message(
    bundle: Mapping[str, float] | None,
    groups: Sequence[GroupSpec],
    nodes: Mapping[str, Mapping[str, float]],
) -> str:
    """The text of a `PlacementError`: asked, available, what to change."""
    lines = ["the groups do not fit on the cluster."]
    if bundle is not None:
        lines[0] = (
            f"the groups do not fit on the cluster: no node has {_show(bundle)} left for one of their parts."
        )
    lines.append("asked:")
    for group in groups:
        where = f", sharing with {group.colocate_with}" if group.colocate_with else ""
        if group.per_node is not None:
            where += f", {group.per_node} on each of {group.workers // group.per_node} node(s)"
        lines.append(f"  {group.name}: {group.workers} worker(s), each {_show(group.demand())}{where}")
    lines.append("available:")
    lines += [f"  node {name}: {_show(have)}" for name, have in nodes.items()] or ["  no node is alive"]
    lines.append(
        "Ask for fewer workers (--policy_workers, --rollout_workers, --reference_workers, --reward_workers), "
        "for smaller "
        "ones (--cpus_per_..., --gpus_per_...), let groups share (--colocate true), or add nodes."
    )
    return "\n".join(lines)


def neighbours_first(node_of_bundle: Mapping[int, Node], bundles: Sequence[int]) -> list[int]:
    """Sorts bundles so that those of one node are adjacent: ranks of a node become neighbours.

    Nodes keep the order of their address, not of Ray's answer, so that a rank lands on the same node in each
    run.
    """
    return sorted(bundles, key=lambda index: (*node_of_bundle[index].order(), index))


def _demanding(bundle: Mapping[str, float]) -> tuple[bool, float, float]:
    return bool(bundle.keys() - {"CPU", "GPU"}), bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)


def _holds(have: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(have.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())


def _show(resources: Mapping[str, float]) -> str:
    shown = [f"{amount:g} {name}" for name, amount in sorted(resources.items()) if amount > 0]
    return ", ".join(shown) or "nothing"
