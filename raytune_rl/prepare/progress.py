"""How far a long piece of work is: said while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

Tell = Callable[[str], None]

EVERY_S = 1.0
"""Seconds between two sentences."""


class RowProgress:
    """A `progress` that says how many rows are done, of how many where that is known."""

    def __init__(self, done: str, tell: Tell, total: int | None = None) -> None:
        self._done, self._tell = done, tell
        self._of = "" if total is None else f" of {total:,}"
        self._count = 0
        self._next = time.monotonic() + EVERY_S

    def __call__(self, rows: int) -> None:
        self._count += rows
        if time.monotonic() >= self._next:
            self._tell(f"{self._done} {self._count:,}{self._of} rows")
            self._next = time.monotonic() + EVERY_S


def stream_progress(work: Callable[[Tell], Iterable[Any]]) -> Iterator[Any]:
    """Yields the sentences that `work` reports, as it does, and then its results, item by item.

    Raises:
        Exception: Whatever `work` raised.
    """
    sentences: SimpleQueue[str | None] = SimpleQueue()
    results: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.extend(work(sentences.put))
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            failures.append(error)
        sentences.put(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while (sentence := sentences.get()) is not None:
        yield sentence
    thread.join()
    if failures:
        raise failures[0]
    yield from results
