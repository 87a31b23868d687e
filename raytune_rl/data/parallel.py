"""A map over many items with worker processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK_ROWS = 512
#: Below this many items starting processes takes longer than the work.
PARALLEL_FROM = 4096

_shared: dict[str, Any] = {}


def map_chunks(
    function: Callable[[Any, Sequence[T]], list[R]],
    shared: Any,
    items: Sequence[T],
    *,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    parallel_from: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> list[R]:
    """`function(shared, chunk)` over all chunks of the items, results in their order whatever the number of
    processes.

    Args:
        function: A module-level function that returns one result an item.
        shared: What every call needs (a tokenizer), sent to each process once.
        items: The work.
        num_proc: Processes; 1 works in this one.
        progress: Called with the number of items of each finished chunk.
        parallel_from: Fewer items than this are done in this process; `PARALLEL_FROM` unless given.
        chunk_rows: Items a call.
    """
    chunks = [items[start : start + chunk_rows] for start in range(0, len(items), chunk_rows)]
    threshold = PARALLEL_FROM if parallel_from is None else parallel_from
    if num_proc <= 1 or len(items) < threshold:
        return _collect((function(shared, chunk) for chunk in chunks), progress)
    # Spawned, not forked: the driver has threads (Ray, tokenizers), and a fork may inherit a held lock.
    with ProcessPoolExecutor(
        min(num_proc, len(chunks)), multiprocessing.get_context("spawn"), _start, (function, shared)
    ) as pool:
        return _collect(pool.map(_work, chunks), progress)


def _collect(results: Iterator[list[R]], progress: Callable[[int], None] | None) -> list[R]:
    done: list[list[R]] = []
    for result in results:
        done.append(result)
        if progress is not None:
            progress(len(result))
    return list(chain.from_iterable(done))


def _start(function: Callable[[Any, Sequence[T]], list[R]], shared: Any) -> None:
    # The processes are the parallelism; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if (torch := sys.modules.get("torch")) is not None:  # image processors compute with it
        torch.set_num_threads(1)
    _shared.update(function=function, shared=shared)


def _work(chunk: Sequence[Any]) -> list[Any]:
    return _shared["function"](_shared["shared"], chunk)
