"""Waiting for a change."""

from __future__ import annotations

import asyncio

from overlay.wake import Wake


def test_a_wake_lets_all_go_on_who_wait_and_nobody_who_comes_later() -> None:
    async def main() -> None:
        changed = Wake()
        changed.wake()  # nobody waits: it is gone
        went_on: list[str] = []

        async def waiter(name: str) -> None:
            await changed.wait()
            went_on.append(name)

        tasks = [asyncio.create_task(waiter(name)) for name in ("a", "b")]
        await asyncio.sleep(0)
        late = asyncio.create_task(waiter("late"))
        changed.wake()
        await asyncio.gather(*tasks)
        assert went_on == ["a", "b"]
        assert not late.done()
        changed.wake()
        await late

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_waiter_that_is_cancelled_leaves_the_others_waiting() -> None:
    async def main() -> None:
        changed = Wake()
        given_up, patient = asyncio.create_task(changed.wait()), asyncio.create_task(changed.wait())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        assert given_up.cancelled()
        assert not patient.done()
        changed.wake()
        await patient

    asyncio.run(asyncio.wait_for(main(), 5))
