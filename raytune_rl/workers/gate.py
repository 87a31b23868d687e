"""Who may go to the engine, and when. All of it in the actor's event loop: nothing here is a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

from raytune_rl.protocol.tickets import Burst

BURST_WAIT_S = 60.0
"""How long the first of a burst wait for the others: far longer than their way here."""

Member = TypeVar("Member")


class Gate:
    """Lets groups in, or closes until something is done."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty, self._turn = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._open.set()
        self._empty.set()

    async def opened(self) -> None:
        """Waits until it is open; whoever goes in must do so before the event loop turns to others."""
        while not self._open.is_set():
            await self._open.wait()

    def enter(self) -> None:
        """One is inside."""
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """One is out again."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    @asynccontextmanager
    async def closed(self, *, empty: bool) -> AsyncIterator[None]:
        """Nobody comes in meanwhile; with `empty` it begins when all that were inside are out."""
        async with self._turn:
            self._open.clear()
            try:
                if empty:
                    await self._empty.wait()
                yield
            finally:
                self._open.set()


class Bursts(Generic[Member]):
    """Holds what is to begin together until all of it is there.

    Args:
        begin: Given the members of a burst in their order.
        wait_s: After so long it begins without those that are missing.
    """

    def __init__(
        self, begin: Callable[[Sequence[Member]], Awaitable[None]], wait_s: float = BURST_WAIT_S
    ) -> None:
        self._begin, self._wait_s = begin, wait_s
        self._held: dict[str, dict[int, Member]] = {}
        self._begun: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Future[None]] = set()  # the event loop itself keeps no task alive

    async def arrive(self, member: Member, burst: Burst | None) -> None:
        """Brings a member; returns when it has begun."""
        if burst is None or burst.size == 1:
            await self._begin([member])
            return
        held = self._held.setdefault(burst.name, {})
        held[burst.index] = member
        begun = self._begun.setdefault(burst.name, asyncio.Event())
        if len(held) < burst.size:
            with suppress(TimeoutError):
                await asyncio.wait_for(begun.wait(), self._wait_s)
        mine = self._held.pop(burst.name, None)
        if mine is not None:
            begin = asyncio.ensure_future(self._begin([mine[index] for index in sorted(mine)]))
            begin.add_done_callback(lambda _: begun.set())
            del self._begun[burst.name]
            self._tasks.add(begin)
            begin.add_done_callback(self._tasks.discard)
        await begun.wait()
