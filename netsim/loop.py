"""An asyncio event loop whose time jumps to the next event: hours of protocol in milliseconds, the same every run.

Owns virtual time and nothing else. There are no sockets, no threads, no signals and no waiting: when every ready callback
has run, time is moved to the next timer. A loop in which nothing is left to happen says so (`NothingWillHappen`)
instead of hanging.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Never, TypeVar

Result = TypeVar("Result")


class NothingWillHappen(RuntimeError):
    """The main task waits for something that no callback and no timer can bring about."""


class _NoSelector:
    """What the base loop polls: there is no I/O, so waiting for it moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Never]:
        if timeout is None:
            raise NothingWillHappen("no callback is ready and no timer is set: the simulation is stuck")
        self._loop.advance(timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """``loop.time()`` starts at ``start_s``; `asyncio.sleep`, `timeout` and `call_later` work unchanged."""

    def __init__(self, start_s: float = 1000.0) -> None:
        super().__init__()
        self._now = start_s
        self._selector = _NoSelector(self)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Jump; the base loop calls this with the time to its next timer."""
        if seconds > 0:
            self._now += seconds

    def _process_events(self, event_list: list[Never]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody waits in a selector, so nobody needs waking."""

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """There is one thread; signal handlers come this way too."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Never:  # type: ignore[override]
        raise RuntimeError("a simulated node has no threads: pass it an inline implementation")


def run(main: Coroutine[Any, Any, Result], start_s: float = 1000.0) -> Result:
    """Like `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start_s)) as runner:
        return runner.run(main)
