"""Whether the cluster's head, and the nodes that hold workers, are there at all.

Ray itself tells of a lost node after many seconds, of the only node never, and when its head is gone it ends
the process from C++ after a minute. Here a thread knocks at the ports of their daemons: where nobody listens
any more, the main thread is interrupted, and the run ends by name.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray

from raytune_rl.errors import NodeLostError
from raytune_rl.runtime.placement import Slot
from raytune_rl.runtime.signals import set_handlers

EVERY_S = 2.0
KNOCKS, HEADS_KNOCKS = 3, 15
"""So many in a row must be refused. The head of a cluster that others keep may be starting anew: Ray itself
waits a minute for it."""
UNWIND_S = 20.0
"""Seconds that the main thread has to end in order; Ray's own end comes 60 s after its head's."""
INTERRUPT = signal.SIGRTMIN + 7


@dataclass
class Place:
    """A daemon that must be there.

    Attributes:
        what: As a person would name it.
        host, port: Where it listens.
        then: What is lost with it, and what to do.
        knocks: So many in a row must be refused.
        refused: Knocks in a row that nobody answered.
    """

    what: str
    host: str
    port: int
    then: str
    knocks: int = KNOCKS
    refused: int = 0

    def knock(self) -> bool:
        """Whether somebody listens. A host that does not answer at all is left to Ray: it may be slow."""
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except ConnectionRefusedError:
            self.refused += 1
            return False
        except OSError:
            return True
        self.refused = 0
        return True

    @property
    def loss(self) -> str:
        return f"{self.what} is lost: nothing listens at {self.host}:{self.port} any more. {self.then}"


@dataclass
class Health:
    """Of the cluster that this process is connected to.

    Attributes:
        lost: What is gone, in sentences for the user; None while all is there.
        head_lost: Whether it is the head: then no call to Ray comes back.
        one_node: Whether the cluster was started here, and so has no other.
        rescued: What was saved after the loss, for whoever begins again.
    """

    lost: str | None = None
    head_lost: bool = False
    one_node: bool = False
    rescued: Path | None = None
    _places: dict[str, Place] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Looks at once, after an error that a lost node would explain.

        Raises:
            NodeLostError: A node, or the head, is gone.
        """
        for key, place in list(self._places.items()):
            if self.lost is None and place.knocks == KNOCKS and not place.knock() and not place.knock():
                self._lose(key, place)
        if self.lost is not None:
            raise self.error()

    def watch(self, slots: Mapping[str, Sequence[Slot]]) -> None:
        """From now on the nodes of these slots are looked at."""
        workers: dict[str, list[str]] = {}
        for name, places in slots.items():
            for rank, slot in enumerate(places):
                workers.setdefault(slot.node.node_id, []).append(f"{name}[{rank}]")
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] in workers:
                self._places[node["NodeID"]] = Place(
                    f"node {node['NodeManagerAddress']}",
                    node["NodeManagerAddress"],
                    node["NodeManagerPort"],
                    f"It held {', '.join(workers[node['NodeID']])}. Its Ray daemon or the machine has ended, "
                    "often for want of memory (dmesg, and raylet.out in the session's logs, tell why). Put "
                    "it right, or start with fewer workers.",
                )

    def error(self) -> NodeLostError:
        """The loss, for whoever can go on on other nodes."""
        error = NodeLostError(self.lost)
        error.survivable = self.survivable
        error.rescued = self.rescued
        return error

    @property
    def survivable(self) -> bool:
        """Whether a run that lost this can go on."""
        return not (self.head_lost or self.one_node)

    def _lose(self, key: str, place: Place) -> None:
        self.lost, self.head_lost = place.loss, key == ""

    def _run(self, main: int) -> None:
        while not self._ended.wait(EVERY_S):
            for key, place in list(self._places.items()):
                if not place.knock() and place.refused >= place.knocks and self.lost is None:
                    self._lose(key, place)
            if self.lost is not None:
                break
        if self._ended.is_set():
            return
        signal.pthread_kill(main, INTERRUPT)
        if not self._ended.wait(UNWIND_S):
            print(f"raytune-rl: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def end(self) -> None:
        """Nobody looks any more: the session is over, whatever became of it."""
        self._ended.set()


_present = Health()


def health() -> Health:
    """Of the present session; outside of one, a health that never finds anything."""
    return _present


@contextmanager
def watched(address: str, started_here: bool) -> Iterator[Health]:
    """Watches the cluster whose head is at `address` for the time of the block. Once something is lost, the
    process has `UNWIND_S` seconds to call `Health.end`.

    Raises:
        NodeLostError: In the block, wherever it is, once a node or the head is gone. Not in a thread, which
            cannot be interrupted.
    """
    global _present
    host, _, port = address.rpartition(":")
    mine = Health(one_node=started_here)
    then = "Look at its logs (gcs_server.out), and start a cluster anew."
    knocks = KNOCKS if started_here else HEADS_KNOCKS
    mine._places[""] = Place("the head of the Ray cluster", host.strip("[]"), int(port), then, knocks)
    before, _present = _present, mine
    # The handler stays: without one, the signal would end the process.
    if set_handlers({INTERRUPT: _interrupted}):
        args = (threading.get_ident(),)
        threading.Thread(target=mine._run, args=args, name="health", daemon=True).start()
    try:
        yield mine
    except KeyboardInterrupt:
        if mine.lost is not None:
            raise mine.error() from None
        raise
    finally:
        _present = before
        if mine.lost is None:
            mine.end()


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt
