"""Second copies of objects, here, of what lies on nodes that may go.

What an actor answers lies in the object store of its node. When that node goes, Ray turns to another copy if
there is one: one is made on this node while the first is still there. Ray may drop it where memory is short.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import ray

COPY_S = 60.0
"""Seconds that the copies of one answer may take."""


class Copies:
    """Makes copies, one answer after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[list[Any] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="copies", daemon=True).start()

    def keep(self, refs: Sequence[Any]) -> None:
        """Copies of these objects are wanted. Returns at once."""
        self._wanted.put(list(refs))

    def end(self) -> None:
        """No more copies are made."""
        self._wanted.put(None)

    def _run(self) -> None:
        while (refs := self._wanted.get()) is not None:
            # Waits until they are here; what is lost meanwhile is told to whoever reads it.
            ray.wait(refs, num_returns=len(refs), timeout=COPY_S, fetch_local=True)
            refs.clear()
