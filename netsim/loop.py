"""An asyncio event loop whose time jumps to the next event: hours of protocol in milliseconds, the same every run.

Owns virtual time, the order of callbacks, and which host a callback belongs to; knows of hosts only their names. There are no
sockets, no threads and no waiting: when every ready callback has run, time moves to the next timer. What asyncio leaves to
memory addresses or to chance is decided here: tasks and futures hash by a serial number (sets of them iterate alike in every
process), timers of one moment run in the order of their creation, functions for executors run at once, and garbage is
collected after a number of callbacks, so that finalizers run at the same place. A loop in which nothing is left to happen
says so (`NothingWillHappen`) instead of hanging. docs/netsim.md, section 2.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Never, TypeVar
from weakref import ref

Result = TypeVar("Result")

HOST: ContextVar[str] = ContextVar("HOST", default="")
"""Whose callback runs; "" is nobody's: the world's own."""

CALLBACKS_PER_TURN = 10_000
"""So many callbacks run before the base loop looks whether it shall stop, and garbage is thought of."""

TURNS_PER_MOMENT_MAX = 2_000
"""So many turns without time moving are taken for a livelock: 20 million callbacks."""

YOUNG_COLLECTION_CALLBACKS = 50_000
FULL_COLLECTION_CALLBACKS = 2_000_000

CANCELLED_TIMERS_MIN = 1_000
"""Fewer cancelled timers than this are left lying in the heap until their time."""

FAILURES_MAX = 1_000
"""Failures after these are not kept: the run has failed."""

PRUNE_TASKS_MIN = 64


class NothingWillHappen(RuntimeError):
    """The main task waits for something that no callback and no timer can bring about."""


class TimeStandsStill(RuntimeError):
    """Callbacks make each other ready without end, so that time never moves."""


class UntakenError(RuntimeError):
    """Exceptions that nobody took, as the loop's exception handler got them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What reached the loop's exception handler."""

    at_s: float
    host: str
    message: str
    error: BaseException | None

    def __str__(self) -> str:
        return f"{self.at_s:.6f} {self.host or '-'}: {self.message}" + (f" ({self.error!r})" if self.error else "")


class OrderedTask(asyncio.Task[Result]):
    """A task that hashes by its age."""

    __slots__ = ("serial",)

    def __init__(
        self,
        coro: Generator[Any, None, Result] | Coroutine[Any, Any, Result],
        *,
        loop: VirtualLoop,
        name: str | None = None,
        context: Context | None = None,
    ) -> None:
        self.serial = serial = loop.next_serial()
        super().__init__(coro, loop=loop, name=name or f"task-{serial}", context=context)

    def __hash__(self) -> int:
        return self.serial


class OrderedFuture(asyncio.Future[Result]):
    """A future that hashes by its age."""

    __slots__ = ("serial",)

    def __init__(self, *, loop: VirtualLoop) -> None:
        self.serial = loop.next_serial()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.serial


class _Ready(asyncio.Handle):
    """A callback that is due; made without asking for the debug mode, which takes half of the time."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop, context: Context | None
    ) -> None:
        _fill(self, callback, args, loop, context)


class _Timer(asyncio.TimerHandle):
    """A callback with a time."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context | None,
    ) -> None:
        _fill(self, callback, args, loop, context)
        self._when = when
        self._scheduled = True


def _fill(
    handle: Any, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop, context: Context | None
) -> None:
    """What `asyncio.Handle.__init__` sets."""
    handle._context = copy_context() if context is None else context
    handle._loop = loop
    handle._callback = callback
    handle._args = args
    handle._cancelled = False
    handle._repr = None
    handle._source_traceback = None


class VirtualLoop(asyncio.BaseEventLoop):
    """``loop.time()`` starts at ``start_s``; `asyncio.sleep`, `timeout` and `call_later` work unchanged."""

    def __init__(self, start_s: float = 1000.0) -> None:
        super().__init__()
        self._now = start_s
        self._due: deque[Any] = deque()
        self._timers: list[tuple[float, int, Any, Any, Any]] = []
        self._serial = 0
        self._cancelled_timers = 0
        self._stopping = False
        self._frozen: dict[str, list[Any]] = {}
        self._contexts: dict[str, Context] = {}
        self._tasks: dict[str, list[ref[OrderedTask[Any]]]] = {}
        self._prune_at: dict[str, int] = {}
        self._turn_began = start_s
        self._still_turns = 0
        self._next_young = YOUNG_COLLECTION_CALLBACKS
        self._next_full = FULL_COLLECTION_CALLBACKS
        self.events = 0
        """Callbacks run."""
        self.failures: list[Failure] = []

    def time(self) -> float:
        return self._now

    def next_serial(self) -> int:
        """The next number of this loop's one sequence: of tasks, futures and timers."""
        self._serial = serial = self._serial + 1
        return serial

    @property
    def timer_count(self) -> int:
        """Timers in the heap, cancelled ones among them."""
        return len(self._timers)

    # --- callbacks ---

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        handle = _Ready(callback, args, self, context)
        self._due.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """There is one thread; signal handlers come this way too."""
        return self.call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        handle = _Timer(when, callback, args, self, context)
        self._serial = serial = self._serial + 1
        heappush(self._timers, (when, serial, handle, None, None))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def post_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """A timer of the world's own: no host's, never frozen, can't be cancelled, and costs little. What it raises ends the run."""
        self._serial = serial = self._serial + 1
        heappush(self._timers, (when, serial, None, callback, args))

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """Cancelled timers are swept out once they are the majority, so that they never pile up."""
        if not handle._scheduled:
            return
        self._cancelled_timers += 1
        timers = self._timers
        if self._cancelled_timers < CANCELLED_TIMERS_MIN or self._cancelled_timers * 2 < len(timers):
            return
        handle._cancelled, handle._callback, handle._args = True, None, None
        timers[:] = [entry for entry in timers if entry[2] is None or not entry[2]._cancelled]
        heapify(timers)
        self._cancelled_timers = 0

    # --- tasks, futures, executors ---

    def create_future(self) -> asyncio.Future[Any]:
        return OrderedFuture(loop=self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        task: OrderedTask[Any] = OrderedTask(coro, loop=self, name=None if name is None else str(name), context=context)
        host = HOST.get() if context is None else context.get(HOST, "")
        found = self._tasks.setdefault(host, [])
        found.append(ref(task))
        if len(found) > self._prune_at.get(host, PRUNE_TASKS_MIN):
            found[:] = [alive for alive in found if _is_live(alive())]
            self._prune_at[host] = max(PRUNE_TASKS_MIN, 2 * len(found))
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run the function now, as no part of the loop; the future is done at the next turn."""
        future = self.create_future()
        asyncio._set_running_loop(None)
        try:
            result = func(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - as of a thread: whatever it raises goes to who waits
            self.call_soon(_fail, future, error)
        else:
            self.call_soon(_finish, future, result)
        finally:
            asyncio._set_running_loop(self)
        return future

    # --- hosts ---

    def context_of(self, host: str) -> Context:
        """The context for a host's entry points: a callback run in it is the host's, and so is everything it starts."""
        context = self._contexts.get(host)
        if context is None:
            context = self._contexts[host] = Context()
            context.run(HOST.set, host)
        return context

    def freeze(self, host: str) -> None:
        """From now on the host's callbacks wait, in their order; idempotent."""
        self._frozen.setdefault(host, [])

    def thaw(self, host: str) -> None:
        """What waited is due now, in its order."""
        self._due.extend(self._frozen.pop(host, ()))

    def is_frozen(self, host: str) -> bool:
        return host in self._frozen

    def tasks_of(self, host: str) -> list[asyncio.Task[Any]]:
        """The host's tasks that aren't done, oldest first."""
        tasks = (alive() for alive in self._tasks.get(host, ()))
        return [task for task in tasks if task is not None and not task.done()]

    def forget(self, host: str) -> None:
        """A host's process is over: drops what waits while it is frozen, its context and the list of its tasks."""
        for kept in (self._frozen, self._contexts, self._tasks, self._prune_at):
            kept.pop(host, None)

    # --- errors ---

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nobody took an exception: kept in ``failures``."""
        if len(self.failures) < FAILURES_MAX:
            message = context.get("message") or "unhandled exception"
            named = context.get("task") or context.get("future") or context.get("handle")
            text = f"{message}: {named!r}" if named is not None else str(message)
            self.failures.append(Failure(self._now, HOST.get(), text, context.get("exception")))

    def raise_failures(self) -> None:
        """Raises UntakenError if there were any."""
        if self.failures:
            told = "\n".join(str(failure) for failure in self.failures[:10])
            raise UntakenError(f"{len(self.failures)} exceptions were taken by nobody:\n{told}") from self.failures[
                0
            ].error

    # --- running ---

    def run_forever(self) -> None:
        """As the base loop; the collector runs when this loop says, not when a count of allocations does."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            super().run_forever()
        finally:
            if was_enabled:
                gc.enable()

    def _run_once(self) -> None:
        self._watch_time()
        self._collect()
        due, timers, frozen = self._due, self._timers, self._frozen
        handle: Any
        for _ in range(CALLBACKS_PER_TURN):
            if self._stopping:
                return
            if due:
                handle = due.popleft()
            elif timers:
                when, _, handle, callback, args = heappop(timers)
                if handle is None:
                    self._now = max(self._now, when)
                    self.events += 1
                    callback(*args)
                    continue
                handle._scheduled = False
                if handle._cancelled:
                    self._cancelled_timers -= 1
                    continue
                self._now = max(self._now, when)
            else:
                raise NothingWillHappen("no callback is ready and no timer is set: the simulation is stuck")
            if handle._cancelled or (frozen and self._park(handle)):
                continue
            self.events += 1
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - supervision: as asyncio's own handles do
                what = f"exception in callback {getattr(handle._callback, '__qualname__', handle._callback)}"
                handle._context.run(self.call_exception_handler, {"message": what, "exception": error})

    def _park(self, handle: Any) -> bool:
        waiting = self._frozen.get(handle._context.get(HOST, ""))
        if waiting is None:
            return False
        waiting.append(handle)
        return True

    def _watch_time(self) -> None:
        self._still_turns = self._still_turns + 1 if self._now == self._turn_began else 0
        self._turn_began = self._now
        if self._still_turns > TURNS_PER_MOMENT_MAX:
            raise TimeStandsStill(f"{self._still_turns * CALLBACKS_PER_TURN} callbacks ran at {self._now}: a livelock")

    def _collect(self) -> None:
        if self.events >= self._next_full:
            self._next_full = self.events + FULL_COLLECTION_CALLBACKS
            gc.collect()
        elif self.events >= self._next_young:
            self._next_young = self.events + YOUNG_COLLECTION_CALLBACKS
            gc.collect(1)

    def _process_events(self, event_list: list[Never]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody waits in a selector, so nobody needs waking."""


def _is_live(task: OrderedTask[Any] | None) -> bool:
    return task is not None and not task.done()


def _finish(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def run(main: Coroutine[Any, Any, Result], start_s: float = 1000.0) -> Result:
    """Like `asyncio.run`, in virtual time. Raises UntakenError for exceptions that nobody took."""
    loop = VirtualLoop(start_s)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(main)
    gc.collect(1)  # what was dropped without being looked at says so when it is collected
    loop.raise_failures()
    return result
