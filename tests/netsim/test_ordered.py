"""Sets of tasks and futures are walked in order of age, not of memory addresses; dead tasks are taken apart from the inside."""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Coroutine, Generator
from contextvars import ContextVar
from typing import Any, cast

from netsim.loop import run
from netsim.ordered import CLOSINGS_MAX, OrderedTask, take_apart

COLOUR: ContextVar[str] = ContextVar("COLOUR", default="none")


async def nothing() -> None:
    """Done at once."""


def test_a_set_of_tasks_or_futures_is_walked_in_the_same_order_each_time_wherever_they_lie_in_memory() -> None:
    kept: list[object] = []
    """So that those of the second time lie elsewhere."""

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        made: list[asyncio.Future[Any]] = []
        for _ in range(50):
            made += [loop.create_task(nothing()), loop.create_future(), asyncio.gather(loop.create_future())]
        kept.extend(made)
        walked = [made.index(one) for one in set(made)]
        for one in made:
            one.cancel()
        await asyncio.wait(made)
        return walked

    first = run(main())
    kept.extend(object() for _ in range(7))
    assert run(main()) == first


def test_a_task_is_named_by_its_age_unless_it_has_a_name() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        task, named = loop.create_task(nothing()), loop.create_task(nothing(), name="mine")
        assert isinstance(task, OrderedTask)
        assert (task.get_name(), named.get_name()) == (f"task-{task.serial}", "mine")
        await asyncio.wait([task, named])

    run(main())


def test_callbacks_and_timers_run_in_the_context_they_were_made_in() -> None:
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        COLOUR.set("red")
        loop.call_soon(lambda: seen.append(COLOUR.get()))
        loop.call_later(1.0, lambda: seen.append(COLOUR.get()))
        loop.call_later(0.5, lambda: seen.append("never")).cancel()
        COLOUR.set("green")
        await asyncio.sleep(2.0)

    run(main())
    assert seen == ["red", "red"]


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Waits for somebody to go on."""
    yield


class Dead:
    """A task that nobody steps any more; it had come to its first pause."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work
        work.send(None)

    def get_coro(self) -> Coroutine[Any, Any, None]:
        return self._work


def take_dead_apart(work: Coroutine[Any, Any, None]) -> None:
    take_apart(cast(asyncio.Task[None], Dead(work)))


def test_a_dead_task_is_closed_from_the_inside_and_clean_ups_that_await_are_passed_by() -> None:
    told: list[str] = []

    async def inner() -> None:
        try:
            await pause()
        finally:
            told.append("inner")
            await pause()
            told.append("never")

    async def outer() -> None:
        try:
            await inner()
        finally:
            told.append("outer")

    work = outer()
    take_dead_apart(work)
    assert told == ["inner", "outer"]
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_a_clean_up_that_fails_without_its_loop_is_nobodys() -> None:
    async def failing() -> None:
        try:
            await pause()
        finally:
            asyncio.get_running_loop()

    work = failing()
    take_dead_apart(work)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_a_clean_up_without_an_end_is_given_up() -> None:
    tries = 0

    async def stubborn() -> None:
        nonlocal tries
        while tries <= CLOSINGS_MAX:
            try:
                await pause()
            except GeneratorExit:
                tries += 1

    work = stubborn()
    take_dead_apart(work)
    assert tries == CLOSINGS_MAX
    work.close()
