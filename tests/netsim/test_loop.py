"""Virtual time: nothing waits, everything happens in order."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from netsim.loop import (
    CALLBACKS_PER_TURN,
    CANCELLED_TIMERS_MIN,
    HOST,
    NothingWillHappen,
    TimeStandsStill,
    UntakenError,
    VirtualLoop,
    run,
)

ROOT = Path(__file__).parents[2]


def virtual() -> VirtualLoop:
    return cast(VirtualLoop, asyncio.get_running_loop())


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


def test_what_an_executor_runs_is_done_a_little_later_and_its_errors_go_to_who_waits() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, sum, (1, 2))
        await asyncio.sleep(0)
        assert not future.done()
        assert await future == 3
        assert await asyncio.to_thread(len, "four") == 4
        with pytest.raises(ValueError, match="no"):
            await asyncio.to_thread(fail)
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(asyncio.get_running_loop)

    run(main())


def test_jobs_of_one_executor_keep_their_order_and_one_that_was_cancelled_before_is_not_run() -> None:
    async def main() -> list[int]:
        loop = virtual()
        order: list[int] = []
        delays = iter((0.5, 0.1, 0.3))
        loop.executor_delay_s = lambda host: next(delays)
        executor = cast(ThreadPoolExecutor, object())
        jobs = [loop.run_in_executor(executor, order.append, number) for number in range(3)]
        jobs[1].cancel()
        await asyncio.wait(jobs)
        return order

    assert run(main()) == [0, 2]


def test_threads_are_refused() -> None:
    async def main() -> None:
        threading.Thread(target=print, name="sneaky").start()

    with pytest.raises(RuntimeError, match=r"no threads.*sneaky"):
        run(main())


def test_nothing_of_a_muted_host_runs_again_not_even_its_clean_up() -> None:
    async def main() -> None:
        loop = virtual()
        said: list[str] = []

        async def life(name: str) -> None:
            try:
                while True:
                    await asyncio.sleep(1.0)
                    said.append(name)
            finally:
                if loop.is_running():
                    said.append("clean-up")
                await asyncio.sleep(1.0)

        first = loop.create_task(life("first"), context=loop.context_of("a"))
        loop.call_later(3.0, said.append, "timer", context=loop.context_of("a"))
        await asyncio.sleep(1.5)
        loop.mute("a")
        first.cancel()
        second = loop.create_task(life("second"), context=loop.context_of("a"))
        await asyncio.sleep(2.2)
        assert said == ["first", "second", "second"]
        assert not first.done()
        assert loop.tasks_of("a") == [second]

    run(main())


def test_the_dead_are_taken_apart_quietly_whatever_their_clean_up_awaits() -> None:
    async def daemon() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            for _ in range(40):
                await asyncio.sleep(1)

    async def life() -> None:
        try:
            await daemon()
        except Exception:
            await asyncio.sleep(1)
            raise

    async def main() -> None:
        loop = virtual()
        loop.create_task(life(), context=loop.context_of("a"))
        await asyncio.sleep(1)
        loop.mute("a")

    run(main())
    gc.collect()  # what was dropped while it stood in its clean-up would say so now


def test_timers_of_one_moment_run_in_the_order_of_their_creation() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        order: list[int] = []
        for number in range(500):
            loop.call_at(loop.time() + 1.0, order.append, number)
        await asyncio.sleep(2)
        return order

    assert run(main()) == list(range(500))


def test_a_hundred_thousand_cancelled_timeouts_leave_nothing_behind() -> None:
    async def main() -> int:
        loop = virtual()
        most = 0
        for _ in range(100_000):
            loop.call_later(3600, print).cancel()
            most = max(most, loop.timer_count)
        return most

    assert run(main()) <= 2 * CANCELLED_TIMERS_MIN


def test_a_livelock_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netsim.loop.TURNS_PER_MOMENT_MAX", 3)

    async def main() -> None:
        for _ in range(100 * CALLBACKS_PER_TURN):
            await asyncio.sleep(0)

    with pytest.raises(TimeStandsStill):
        run(main())


def test_a_frozen_hosts_callbacks_wait_and_then_run_in_their_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop, said = virtual(), []
        began = loop.time()

        async def life(name: str) -> None:
            for _ in range(3):
                await asyncio.sleep(1.0)
                said.append((name, loop.time() - began))

        tasks = [loop.create_task(life(name), context=loop.context_of(name)) for name in ("a", "b")]
        await asyncio.sleep(0.5)
        loop.freeze("a")
        loop.call_soon(said.append, ("soon", 0.0), context=loop.context_of("a"))
        await asyncio.sleep(2.0)
        assert loop.is_frozen("a")
        loop.thaw("a")
        await asyncio.wait(tasks)
        return said

    assert run(main()) == [
        ("b", 1.0),
        ("b", 2.0),
        ("soon", 0.0),
        ("a", 2.5),
        ("b", 3.0),
        ("a", 3.5),
        ("a", 4.5),
    ]


def test_what_a_host_starts_is_the_hosts() -> None:
    async def main() -> None:
        loop = virtual()
        seen: list[str] = []

        async def inner() -> None:
            seen.append(HOST.get())
            await asyncio.sleep(9)

        async def outer() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner(), name="inner")
                loop.call_soon(lambda: seen.append(HOST.get()))

        task = loop.create_task(outer(), name="outer", context=loop.context_of("home-1"))
        await asyncio.sleep(1)
        assert seen == ["home-1", "home-1"]
        assert [found.get_name() for found in loop.tasks_of("home-1")] == ["outer", "inner"]
        assert HOST.get() == ""
        await task
        assert loop.tasks_of("home-1") == []

    run(main())


def test_an_exception_that_nobody_took_fails_the_run() -> None:
    async def fail() -> None:
        raise ValueError("lost")

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    with pytest.raises(UntakenError, match="lost"):
        run(main())

    async def callback_fails() -> None:
        loop = virtual()
        loop.call_soon([].pop, context=loop.context_of("home-2"))
        await asyncio.sleep(0)

    with pytest.raises(UntakenError, match=r"home-2.*pop from empty list"):
        run(callback_fails())


ORDERS = """
import asyncio, random, sys
from netsim.loop import run

junk = [bytes(random.randrange(2000)) for _ in range(random.randrange(20000))]

async def main():
    order = []
    async def wait_long(number):
        try:
            await asyncio.sleep(random_sleep[number % 7])
        except asyncio.CancelledError:
            order.append(number)
            raise
    random_sleep = [3600.0 + n for n in range(7)]
    async def fail():
        await asyncio.sleep(1)
        raise ValueError
    junk.extend(object() for _ in range(random.randrange(1000)))
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(wait_long(number))
                junk.append(bytes(random.randrange(600)))
            group.create_task(fail())
    except* ValueError:
        pass
    loop = asyncio.get_running_loop()
    futures = []
    for number in range(200):
        futures.append(loop.create_future())
        junk.append(bytes(random.randrange(600)))
        loop.call_later((number * 37) % 11, futures[-1].set_result, number)
    done, pending = await asyncio.wait(futures, timeout=5)
    order += [future.result() for future in done]
    order += [futures.index(future) for future in pending]
    await asyncio.wait(pending)
    gathered = [asyncio.gather(asyncio.sleep(number % 5)) for number in range(50)]
    done, pending = await asyncio.wait(gathered, timeout=2.5)
    order += [gathered.index(future) for future in done] + [gathered.index(future) for future in pending]
    await asyncio.wait(pending)
    return order

print(run(main()))
"""


def test_sets_of_tasks_and_futures_iterate_alike_in_every_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", ORDERS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PYTHONMALLOC": allocator},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed, allocator in (("1", "pymalloc"), ("2", "malloc"))
    ]
    assert told[0] == told[1]
    assert len(told[0]) > 1000


def test_what_a_dead_process_would_still_begin_is_never_heard_of() -> None:
    async def main() -> None:
        loop = virtual()

        async def close_something() -> None:
            await asyncio.sleep(1)

        async def life() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                loop.create_task(close_something())
                await close_something()

        kept = loop.create_task(life(), context=loop.context_of("a"))
        await asyncio.sleep(1)
        loop.mute("a")
        assert not kept.done()

    run(main())
    gc.collect()  # a coroutine that was never awaited would be told of here, and fail the test
