"""Second copies of objects, here, of what lies on nodes that may go.

What an actor answers lies in the object store of its node. When that node goes, Ray turns to another copy if
there is one: one is made on this node while the first is still there. Ray may drop it where memory is short.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

COPY_S = 60.0
"""Seconds that the copies of one answer may take."""


class Copies:
    """Makes copies, one answer after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._wanted: deque[tuple[str | None, list[Any]]] = deque()
        self._changed, self._ended = threading.Condition(), False
        threading.Thread(target=self._run, name="copies", daemon=True).start()

    def keep(self, refs: Sequence[Any], newest_of: str | None = None) -> None:
        """Copies of these objects are wanted, once they are there. Returns at once.

        Args:
            refs: They.
            newest_of: A name; what was wanted under it before, and was not begun, no longer is.
        """
        with self._changed:
            if newest_of is not None:
                self._wanted = deque(one for one in self._wanted if one[0] != newest_of)
            self._wanted.append((newest_of, list(refs)))
            self._changed.notify()

    def end(self) -> None:
        """No more copies are made."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _run(self) -> None:
        while (refs := self._next()) is not None:
            # Waits until they are here; what is lost meanwhile is told to whoever reads it.
            ray.wait(refs, num_returns=len(refs), timeout=COPY_S, fetch_local=True)
            refs.clear()

    def _next(self) -> list[Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._ended)
            return None if self._ended else self._wanted.popleft()[1]
