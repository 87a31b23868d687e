"""A fleet's engines come and go: places are asked for and given back, nodes that leave are cleared in time.

It decides nothing about prompts: the fleet starts members on the places that it is told, and gives what a
dismissed one had to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raytune_rl.errors import WorkerDiedError
from raytune_rl.groups.scaling import Demand, ScalingPolicy
from raytune_rl.runtime.placement import Slot

EVERY_S = 1.0
"""Seconds from one look at places, nodes and demand to the next."""
UNSEEN_S = 120.0
"""Seconds that places are waited for before the user is told."""
START_ATTEMPTS = 3
"""Engines in a row that may end before they served anything."""


class Reservation(Protocol):
    """A place that was asked for."""

    def slot(self) -> Slot | None:
        """The place, once there is one."""
        ...

    def give_back(self) -> None:
        """Nobody needs it any more."""
        ...


class Fleet(Protocol):
    """The fleet, as far as its size goes."""

    def demand(self, now: float) -> Demand:
        """What it has to do."""
        ...

    def start_member(self, slot: Slot, now: float) -> int:
        """Starts an engine on a place, and returns its number. It serves once it has pulled weights."""
        ...

    def idle_members(self) -> Sequence[int]:
        """Those that serve and have no work."""
        ...

    def dismiss(self, member: int, now: float) -> None:
        """Ends an engine; others get what it had, at once."""
        ...


@dataclass(frozen=True)
class Cluster:
    """What is asked of the cluster.

    Attributes:
        ask: Asks for a place for one engine.
        leaving: Ids of the nodes that were announced to leave.
    """

    ask: Callable[[], Reservation]
    leaving: Callable[[], Collection[str]]


@dataclass
class _Member:
    place: Reservation
    node_id: str
    served: bool = False


@dataclass
class _Asked:
    place: Reservation
    since: float


@dataclass
class Elastic:
    """Keeps a fleet at the size that a policy says.

    Args:
        fleet: Whose size it is.
        policy: Says how many engines there should be.
        cluster: Who has the places.
        say: Takes sentences for the user.
    """

    fleet: Fleet
    policy: ScalingPolicy
    cluster: Cluster
    say: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    _members: dict[int, _Member] = field(default_factory=dict)
    _asked: list[_Asked] = field(default_factory=list)
    _looked_at: float | None = None
    _in_vain: int = 0
    _told: bool = False

    def adopt(self, member: int, place: Reservation, node_id: str) -> None:
        """An engine that was started before this object was made."""
        self._members[member] = _Member(place, node_id)

    def told(self) -> dict[str, int]:
        """What a `FleetLoad` says of who came and went."""
        counts = self.counts
        return {
            "unplaced": len(self._asked),
            "joined": counts["joined"],
            "left": counts["left"],
            "lost": counts["lost"],
        }

    def look(self, now: float) -> None:
        """Does what is due; to be called often.

        Raises:
            WorkerDiedError: Engines end one after the other before they serve anything.
        """
        if self._looked_at is not None and now - self._looked_at < EVERY_S:
            return
        self._looked_at = now
        self._clear_leaving_nodes(now)
        self._move_in(now)
        surplus = len(self._members) + len(self._asked) - self.policy.target(self.fleet.demand(now), now)
        self._asked += [_Asked(self.cluster.ask(), now) for _ in range(-surplus)]
        if surplus > 0:
            self._give_back(surplus, now)
        self._tell_of_waiting(now)

    def served(self, member: int, now: float) -> None:
        """An engine has pulled weights and serves."""
        if member in self._members and not self._members[member].served:
            self._members[member].served = True
            self.counts["joined"] += 1
            self._in_vain = 0
            self.policy.joined(now)

    def lost(self, member: int) -> None:
        """An engine is gone. Another is asked for at the next look: where its node is still there it gets the
        same place, else any.
        """
        gone = self._members.pop(member, None)
        if gone is None:
            return
        gone.place.give_back()
        self.counts["lost"] += 1
        self._in_vain += not gone.served
        if self._in_vain >= START_ATTEMPTS:
            raise WorkerDiedError(
                f"{self._in_vain} rollout workers in a row ended before they served anything; the notices "
                "above say how each was lost."
            )

    def end(self) -> None:
        """Gives all places back."""
        for asked in self._asked:
            asked.place.give_back()
        for member in self._members.values():
            member.place.give_back()
        self._asked, self._members = [], {}

    # -- inside

    def _move_in(self, now: float) -> None:
        """Engines start on the places that are there now."""
        still = []
        for asked in self._asked:
            slot = asked.place.slot()
            if slot is None:
                still.append(asked)
                continue
            number = self.fleet.start_member(slot, now)
            self._members[number] = _Member(asked.place, slot.node.node_id)
            self._told = False
        self._asked = still

    def _clear_leaving_nodes(self, now: float) -> None:
        if not self._members:
            return
        leaving = self.cluster.leaving()
        for number in [n for n, one in self._members.items() if one.node_id in leaving]:
            self.say(
                f"the node of rollout[{number}] is going to leave the cluster: others get its prompts, and "
                "it leaves"
            )
            self._dismiss(number, now)

    def _give_back(self, surplus: int, now: float) -> None:
        """Places that are still waited for go first, the newest of them; then idle engines, those first whose
        node holds the fewest, so that nodes become free.
        """
        cancelled = self._asked[len(self._asked) - min(surplus, len(self._asked)) :]
        for asked in cancelled:
            asked.place.give_back()
            self._asked.remove(asked)
        on_node = Counter(one.node_id for one in self._members.values())
        idle = sorted(
            (n for n in self.fleet.idle_members() if n in self._members),
            key=lambda n: (on_node[self._members[n].node_id], self._members[n].node_id, -n),
        )
        for number in idle[: surplus - len(cancelled)]:
            self._dismiss(number, now)

    def _dismiss(self, number: int, now: float) -> None:
        self.fleet.dismiss(number, now)
        self._members.pop(number).place.give_back()
        self.counts["left"] += 1

    def _tell_of_waiting(self, now: float) -> None:
        waited = [asked for asked in self._asked if now - asked.since >= UNSEEN_S]
        if waited and not self._told:
            self._told = True
            self.say(
                f"{len(waited)} rollout worker(s) have waited {now - waited[0].since:.0f} s for a place: the "
                "cluster has no room, and no autoscaler has brought a node yet; the run goes on with "
                f"{len(self._members)}"
            )
