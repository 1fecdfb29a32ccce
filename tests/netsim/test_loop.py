"""Virtual time: nothing waits, everything happens in order."""

from __future__ import annotations

import asyncio
import time

import pytest

from netsim.loop import NothingWillHappen, run


def test_an_hour_of_sleep_takes_no_time() -> None:
    async def main() -> float:
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time() - started

    before = time.perf_counter()
    assert run(main()) == pytest.approx(3600)
    assert time.perf_counter() - before < 5


def test_timers_run_in_the_order_of_their_times() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        async with asyncio.TaskGroup() as group:
            for delay in (3, 1, 2):
                group.create_task(after(delay, order))
        return order

    async def after(delay: int, order: list[int]) -> None:
        await asyncio.sleep(delay)
        order.append(delay)

    assert run(main()) == [1, 2, 3]


def test_a_timeout_ends_in_virtual_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return loop.time() - started

    assert run(main()) == pytest.approx(30)


def test_a_wait_that_nothing_can_end_is_an_error_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingWillHappen):
        run(main())


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, print)

    with pytest.raises(RuntimeError, match="no threads"):
        run(main())
