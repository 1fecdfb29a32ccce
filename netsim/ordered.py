"""Tasks, futures and handles of the virtual loop: what asyncio orders by memory addresses is ordered by age here.

Owns their numbers' use as hashes, and how a dead task is taken apart. Knows no time and no hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, Protocol, TypeVar, cast

Result = TypeVar("Result")

CLOSINGS_MAX = 1_000
"""Awaits in the clean-up of a dead task that are passed by before it is left to the collector."""


class Numbering(Protocol):
    """A loop that numbers what it makes."""

    def next_serial(self) -> int: ...


class OrderedTask(asyncio.Task[Result]):
    """A task that hashes by its age."""

    __slots__ = ("serial",)

    def __init__(
        self,
        coro: Generator[Any, None, Result] | Coroutine[Any, Any, Result],
        *,
        loop: Numbering,
        name: str | None = None,
        context: Context | None = None,
    ) -> None:
        self.serial = serial = loop.next_serial()
        super().__init__(
            coro, loop=cast(asyncio.AbstractEventLoop, loop), name=name or f"task-{serial}", context=context
        )

    def __hash__(self) -> int:
        return self.serial


class OrderedFuture(asyncio.Future[Result]):
    """A future that hashes by its age."""

    __slots__ = ("serial",)

    def __init__(self, *, loop: Numbering) -> None:
        self.serial = loop.next_serial()
        super().__init__(loop=cast(asyncio.AbstractEventLoop, loop))

    def __hash__(self) -> int:
        return self.serial


class Ready(asyncio.Handle):
    """A callback that is due; made without asking for the debug mode, which takes half of the time."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], loop: Numbering, context: Context | None
    ) -> None:
        handle: Any = self  # what `asyncio.Handle.__init__` sets
        handle._context = copy_context() if context is None else context
        handle._loop = loop
        handle._callback = callback
        handle._args = args
        handle._cancelled = False
        handle._repr = None
        handle._source_traceback = None


class Timer(asyncio.TimerHandle):
    """A callback with a time."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: Numbering,
        context: Context | None,
    ) -> None:
        handle: Any = self  # spelt out once more: a call for it would cost as much again
        handle._context = copy_context() if context is None else context
        handle._loop = loop
        handle._callback = callback
        handle._args = args
        handle._cancelled = False
        handle._repr = None
        handle._source_traceback = None
        handle._when = when
        handle._scheduled = True


def take_apart(task: asyncio.Task[Any]) -> None:
    """Close the coroutines of a dead task here, innermost first, rather than wherever the collector would.

    A clean-up that awaits refuses to be closed, and is then asked again where it stands: from outside it would only be dropped.
    """
    outermost: Any = task.get_coro()
    for _ in range(CLOSINGS_MAX):
        if outermost.cr_frame is None:
            return
        innermost = outermost
        while getattr(innermost.cr_await, "cr_frame", None) is not None:
            innermost = innermost.cr_await
        with contextlib.suppress(BaseException):  # it awaits, or fails without its loop: nobody hears of it
            innermost.close()


def _hash_of_gathering(gathering: Any) -> int:
    """`asyncio.gather` makes its future itself; it gets its number when a set first asks."""
    serial: int | None = getattr(gathering, "serial", None)
    if serial is None:
        loop = gathering.get_loop()
        serial = loop.next_serial() if hasattr(loop, "next_serial") else object.__hash__(gathering)
        gathering.serial = serial
    return serial


asyncio.tasks._GatheringFuture.__hash__ = _hash_of_gathering  # type: ignore[attr-defined]
