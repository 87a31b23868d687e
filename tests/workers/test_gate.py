"""Who may go to the engine, and what begins together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from raytune_rl.protocol.tickets import Burst
from raytune_rl.workers.gate import Bursts, Gate


def test_closing_waits_for_those_inside_and_keeps_others_out() -> None:
    async def play() -> list[str]:
        gate, seen = Gate(), []

        async def visitor(name: str, stays: asyncio.Event) -> None:
            await gate.opened()
            gate.enter()
            seen.append(f"{name} in")
            await stays.wait()
            seen.append(f"{name} out")
            gate.leave()

        async def closer() -> None:
            async with gate.closed(empty=True):
                seen.append("closed")
                await asyncio.sleep(0.01)
                seen.append("opens")

        leaves, at_once = asyncio.Event(), asyncio.Event()
        at_once.set()
        first = asyncio.ensure_future(visitor("first", leaves))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(closer()), asyncio.ensure_future(closer())]
        await asyncio.sleep(0)
        others.append(asyncio.ensure_future(visitor("second", at_once)))
        await asyncio.sleep(0.01)
        leaves.set()
        await asyncio.gather(first, *others)
        return seen

    closed = ["closed", "opens"]
    seen = asyncio.run(play())
    assert seen[:4] == ["first in", "first out", *closed]
    assert sorted(seen[4:]) == sorted([*closed, "second in", "second out"])


def test_a_load_that_does_not_drain_keeps_others_out_and_waits_for_nobody() -> None:
    async def play() -> None:
        gate = Gate()
        await gate.opened()
        gate.enter()
        async with gate.closed(empty=False):
            late = asyncio.ensure_future(gate.opened())
            await asyncio.sleep(0.01)
            assert not late.done()
        await asyncio.wait_for(late, 1)

    asyncio.run(play())


def burst(order: Sequence[int], size: int, wait_s: float = 60.0, drop: Sequence[int] = ()) -> list[list[str]]:
    """What begins together when these arrive in this order; `drop` are cancelled while they wait."""

    async def play() -> list[list[str]]:
        begun: list[list[str]] = []

        async def begin(members: Sequence[str]) -> None:
            await asyncio.sleep(0)
            begun.append(list(members))

        bursts: Bursts[str] = Bursts(begin, wait_s)
        tasks = {}
        for index in order:
            tasks[index] = asyncio.ensure_future(bursts.arrive(f"m{index}", Burst("b", size, index)))
            await asyncio.sleep(0)
        for index in drop:
            tasks[index].cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        return begun

    return asyncio.run(play())


def test_a_burst_begins_with_its_last_in_its_order() -> None:
    assert burst([2, 0, 1], 3) == [["m0", "m1", "m2"]]
    assert burst([0], 1) == [["m0"]]


def test_a_burst_that_stays_incomplete_begins_all_the_same() -> None:
    assert burst([2, 0], 3, wait_s=0.05) == [["m0", "m2"]]


def test_one_that_leaves_does_not_keep_the_others() -> None:
    assert burst([1, 0, 2], 3, drop=[2]) == [["m0", "m1", "m2"]]
