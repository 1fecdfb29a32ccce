"""Works beside each other: results in their order, a bound on how many run, and the first error as it is."""

from __future__ import annotations

import asyncio

import pytest

from blocks.protocol.call_errors import CallFault
from peerd.in_order import in_order


def test_results_are_in_the_order_of_the_works_and_no_more_run_than_asked() -> None:
    running, most = 0, 0

    async def work(index: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - index):  # the last is done first
            await asyncio.sleep(0)
        running -= 1
        return index

    works = [lambda index=index: work(index) for index in range(6)]  # type: ignore[misc]
    assert asyncio.run(in_order(works, at_once=2)) == list(range(6))
    assert most == 2
    assert asyncio.run(in_order(works)) == list(range(6))
    assert most == 6
    assert asyncio.run(in_order([])) == []


def test_the_first_error_ends_the_others_and_is_raised_as_it_is() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def fails() -> None:
        raise CallFault("busy", "no room")

    with pytest.raises(CallFault, match="no room"):
        asyncio.run(in_order([waits, fails]))
    assert ended == ["cancelled"]
