"""A map over many items with worker processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK_ROWS = 512
#: Seconds that this process works alone at first: about what others take to start, as each imports everything
#: anew. So they are not started for less work than they cost, and work that is long takes little longer.
ALONE_S = 6.0
#: Chunks that are under way at once for each process, so that none waits for the reader.
AHEAD = 2

_shared: dict[str, Any] = {}


def map_chunks(
    function: Callable[[Any, Sequence[T]], list[R]],
    shared: Any,
    items: Sequence[T],
    *,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    alone_s: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[R]:
    """The results of `function(shared, chunk)` over all chunks of the items, one by one and in their order
    whatever the number of processes. Memory holds a few chunks, not all.

    Args:
        function: A module-level function that returns one result an item.
        shared: What every call needs (a tokenizer), sent to each process once.
        items: The work; read chunk by chunk.
        num_proc: Processes; 1 works in this one. More are started once this one has worked for `alone_s`.
        progress: Called with the number of items of each finished chunk.
        alone_s: Seconds; `ALONE_S` unless given.
        chunk_rows: Items a call.
    """
    chunks = (list(items[start : start + chunk_rows]) for start in range(0, len(items), chunk_rows))
    for results in _done(function, shared, chunks, num_proc, ALONE_S if alone_s is None else alone_s):
        yield from results
        if progress is not None:
            progress(len(results))


def _done(
    function: Callable[[Any, Sequence[T]], list[R]],
    shared: Any,
    chunks: Iterator[list[T]],
    num_proc: int,
    alone_s: float,
) -> Iterator[list[R]]:
    spent = 0.0
    for chunk in chunks:
        if num_proc > 1 and spent >= alone_s:
            yield from _spread(function, shared, chain([chunk], chunks), num_proc)
            return
        began = time.perf_counter()
        results = function(shared, chunk)
        spent += time.perf_counter() - began
        yield results


def _spread(
    function: Callable[[Any, Sequence[T]], list[R]], shared: Any, chunks: Iterator[list[T]], num_proc: int
) -> Iterator[list[R]]:
    # Spawned, not forked: the driver has threads (Ray, tokenizers), and a fork may inherit a held lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _start, (function, shared)) as pool:
        under_way: deque[Future[list[R]]] = deque()
        try:
            for chunk in chunks:
                under_way.append(pool.submit(_work, chunk))
                if len(under_way) > AHEAD * num_proc:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:  # a bad row may have ended it: what was asked for ahead is not wanted any more
            for future in under_way:
                future.cancel()


def _start(function: Callable[[Any, Sequence[T]], list[R]], shared: Any) -> None:
    # The processes are the parallelism; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if (torch := sys.modules.get("torch")) is not None:  # image processors compute with it
        torch.set_num_threads(1)
    _shared.update(function=function, shared=shared)


def _work(chunk: Sequence[Any]) -> list[Any]:
    return _shared["function"](_shared["shared"], chunk)
