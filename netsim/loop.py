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
import threading
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Never, TypeVar
from weakref import ref

from netsim.ordered import OrderedFuture, OrderedTask, Ready, Timer, take_apart

Result = TypeVar("Result")

HOST: ContextVar[str] = ContextVar("HOST", default="")
"""Whose callback runs; "" is nobody's: the world's own."""

CALLBACKS_PER_TURN = 10_000
"""So many callbacks run before the base loop looks whether it shall stop, and garbage is thought of."""

TURNS_PER_MOMENT_MAX = 2_000
"""So many turns without time moving are taken for a livelock: 20 million callbacks."""

YOUNG_COLLECTION_CALLBACKS = 200_000
FULL_COLLECTION_CALLBACKS = 2_000_000
"""The first full one; the next when half as many more have run: it looks at all that lives, which grows as well."""

CANCELLED_TIMERS_MIN = 1_000
"""Fewer cancelled timers than this are left lying in the heap until their time."""

CLEAN_UPS_MAX = 8
"""The dead's clean-ups begin tasks, whose clean-ups may begin some."""

FAILURES_MAX = 1_000
"""Failures after these are not kept: the run has failed."""

PRUNE_TASKS_MIN = 64

EXECUTOR_DELAY_S = 0.0005


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


class _Life:
    """One incarnation of a host's process: what is said of all its callbacks."""

    __slots__ = ("context", "is_dead", "parked", "prune_at", "tasks")

    def __init__(self) -> None:
        self.context = Context()
        self.is_dead = False
        self.parked: list[Any] | None = None
        self.tasks: list[ref[OrderedTask[Any]]] = []
        self.prune_at = PRUNE_TASKS_MIN


_LIFE: ContextVar[_Life | None] = ContextVar("_LIFE", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """``loop.time()`` starts at ``start_s``; `asyncio.sleep`, `timeout` and `call_later` work unchanged."""

    def __init__(self, start_s: float = 1000.0) -> None:
        super().__init__()
        self.now_s = start_s
        """What `time` gives; only the loop sets it."""
        self._due: deque[Any] = deque()
        self._timers: list[tuple[float, int, Any, Any, Any]] = []
        self._serial = 0
        self._cancelled_timers = 0
        self._stopping = False
        self._lives: dict[str, _Life] = {}
        self.is_watching = False
        """Whether any process ever stood still or died."""
        self._buried: list[asyncio.Task[Any]] = []
        self.is_left_standing = False
        """Whether `close` leaves the dead as they are; whoever says so keeps the loop until the process ends."""
        self._executors: dict[Any, float] = {}
        self.executor_delay_s: Callable[[str], float] = _usual_executor_delay_s
        """What a job waits for its thread, by host; the world gives one with a seed."""
        self._turn_began = start_s
        self._still_turns = 0
        self._next_young = YOUNG_COLLECTION_CALLBACKS
        self._next_full = FULL_COLLECTION_CALLBACKS
        self.events = 0
        """Callbacks run."""
        self.failures: list[Failure] = []

    def time(self) -> float:
        return self.now_s

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
        handle = Ready(callback, args, self, context)
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
        handle = Timer(when, callback, args, self, context)
        self._serial = serial = self._serial + 1
        heappush(self._timers, (when, serial, handle, None, None))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

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
        life = _LIFE.get() if context is None else context.get(_LIFE)
        if life is not None:
            life.tasks.append(ref(task))
            if len(life.tasks) > life.prune_at:
                life.tasks[:] = [alive for alive in life.tasks if _is_live(alive())]
                life.prune_at = max(PRUNE_TASKS_MIN, 2 * len(life.tasks))
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run the function a little later in one go, in the caller's context; not at all if the future is cancelled before.

        Jobs of one executor keep their order, those of the default one needn't.
        """
        future = self.create_future()
        when = self.now_s + self.executor_delay_s(HOST.get())
        if executor is not None:
            when = self._executors[executor] = max(when, self._executors.get(executor, 0.0))
        self.call_at(when, self._run_job, future, func, args)
        return future

    def _run_job(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if future.done():
            return
        asyncio._set_running_loop(None)
        try:
            result = func(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except StopIteration as error:
            future.set_exception(RuntimeError(f"a function for an executor raised {error!r}"))
        except BaseException as error:  # noqa: BLE001 - as of a thread: whatever it raises goes to who waits
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            asyncio._set_running_loop(self)

    # --- hosts ---

    def _life(self, host: str) -> _Life:
        life = self._lives.get(host)
        if life is None:
            life = self._lives[host] = _Life()
            life.context.run(HOST.set, host)
            life.context.run(_LIFE.set, life)
        return life

    def context_of(self, host: str) -> Context:
        """The context for a host's entry points: a callback run in it is the host's, and so is everything it starts."""
        return self._life(host).context

    def freeze(self, host: str) -> None:
        """From now on the callbacks of the host's process wait; idempotent."""
        self.is_watching = True
        life = self._life(host)
        if life.parked is None:
            life.parked = []

    def thaw(self, host: str) -> None:
        """What waited is due now: first what was ready (reads among it), then timers, each in their order."""
        life = self._lives.get(host)
        if life is None or life.parked is None:
            return
        parked, life.parked = life.parked, None
        self._due.extend(handle for handle in parked if not isinstance(handle, asyncio.TimerHandle))
        self._due.extend(handle for handle in parked if isinstance(handle, asyncio.TimerHandle))

    def is_frozen(self, host: str) -> bool:
        life = self._lives.get(host)
        return life is not None and life.parked is not None

    def tasks_of(self, host: str) -> list[asyncio.Task[Any]]:
        """The tasks of the host's process that aren't done, oldest first."""
        life = self._lives.get(host)
        tasks = (alive() for alive in life.tasks) if life is not None else ()
        return [task for task in tasks if task is not None and not task.done()]

    def mute(self, host: str) -> None:
        """The host's process is dead, as after kill -9: nothing of it runs again, now or later, its clean-up neither.

        Its tasks are kept, standing, until the loop is closed. The next `context_of` begins a new life. Not for a host's own
        callbacks: call it from the world's.
        """
        self.is_watching = True
        life = self._lives.pop(host, None)
        if life is None:
            return
        life.is_dead, life.parked = True, None
        for alive in life.tasks:
            task = alive()
            if task is not None and not task.done():
                asyncio.tasks._unregister_task(task)
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                self._buried.append(task)
        life.tasks.clear()

    def forget(self, host: str) -> None:
        """The next `context_of` begins a new life; what the last one still runs goes on."""
        self._lives.pop(host, None)

    def close(self) -> None:
        """As the base loop; the dead are taken apart first, where nothing they do has an effect (but see `is_left_standing`)."""
        if not self.is_running() and not self.is_closed() and not self.is_left_standing:
            known = len(self.failures)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what their clean-up begins is never awaited, and must not be
                asyncio._set_running_loop(self)  # or what they begin would make itself a loop of the real kind
                try:
                    self._take_apart_dead()
                finally:
                    asyncio._set_running_loop(None)
            del self.failures[known:]
        super().close()

    def _take_apart_dead(self) -> None:
        buried, self._buried = self._buried, []
        dead: list[asyncio.Task[Any]] = buried
        for _ in range(CLEAN_UPS_MAX):
            for task in dead:
                take_apart(task)
            if not dead:
                break
            dead = [task for task in asyncio.all_tasks(self) if not task.done()]  # begun by what was just taken apart
            for task in dead:
                asyncio.tasks._unregister_task(task)
                task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._due.clear()
        self._timers.clear()
        if buried:
            del buried, dead, task
            gc.collect()

    # --- errors ---

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nobody took an exception: kept in ``failures``."""
        if len(self.failures) < FAILURES_MAX:
            message = context.get("message") or "unhandled exception"
            named = context.get("task") or context.get("future") or context.get("handle")
            text = f"{message}: {named!r}" if named is not None else str(message)
            self.failures.append(Failure(self.now_s, HOST.get(), text, context.get("exception")))

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
        start, ours = threading.Thread.start, threading.get_ident()

        def refuse(thread: threading.Thread) -> None:
            if threading.get_ident() == ours:
                raise RuntimeError(f"a simulated node has no threads, and {thread.name} was to be one")
            start(thread)

        gc.disable()
        threading.Thread.start = refuse  # type: ignore[assignment,method-assign]
        try:
            super().run_forever()
        finally:
            threading.Thread.start = start  # type: ignore[method-assign]
            if was_enabled:
                gc.enable()

    def _run_once(self) -> None:
        self._watch_time()
        self._collect()
        due, timers = self._due, self._timers
        handle: Any
        for _ in range(CALLBACKS_PER_TURN):
            if self._stopping:
                return
            if due:
                handle = due.popleft()
            elif timers:
                when, _, handle, callback, args = heappop(timers)
                if handle is None:
                    if when > self.now_s:  # noqa: PLR1730 - max() takes three times as long
                        self.now_s = when
                    self.events += 1
                    callback(*args)
                    continue
                handle._scheduled = False
                if handle._cancelled:
                    self._cancelled_timers -= 1
                    continue
                self.now_s = max(self.now_s, when)
            else:
                raise NothingWillHappen("no callback is ready and no timer is set: the simulation is stuck")
            if handle._cancelled or (self.is_watching and self._is_held(handle)):
                continue
            self.events += 1
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - supervision: as asyncio's own handles do
                what = f"exception in callback {getattr(handle._callback, '__qualname__', handle._callback)}"
                handle._context.run(self.call_exception_handler, {"message": what, "exception": error})

    def _is_held(self, handle: Any) -> bool:
        """Whether a due callback doesn't run: its process is dead, or stands still."""
        life = handle._context.get(_LIFE)
        if life is None:
            return False
        if life.parked is not None:
            life.parked.append(handle)
            return True
        is_dead: bool = life.is_dead
        return is_dead

    def _watch_time(self) -> None:
        self._still_turns = self._still_turns + 1 if self.now_s == self._turn_began else 0
        self._turn_began = self.now_s
        if self._still_turns > TURNS_PER_MOMENT_MAX:
            turns, self._still_turns = self._still_turns, 0  # so that what is left can still be cancelled
            raise TimeStandsStill(f"{turns * CALLBACKS_PER_TURN} callbacks ran at {self.now_s}: a livelock")

    def _collect(self) -> None:
        if self.events >= self._next_full:
            self._next_full = max(self.events * 3 // 2, self.events + FULL_COLLECTION_CALLBACKS)
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


def _usual_executor_delay_s(host: str) -> float:
    return EXECUTOR_DELAY_S


def run(main: Coroutine[Any, Any, Result], start_s: float = 1000.0) -> Result:
    """Like `asyncio.run`, in virtual time. Raises UntakenError for exceptions that nobody took."""
    loop = VirtualLoop(start_s)
    with heap_set_aside():
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result = runner.run(main)
        gc.collect(1)  # what was dropped without being looked at says so when it is collected
    loop.raise_failures()
    return result


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """What there is already is no garbage of a run that begins: looking through it takes a tenth of a second and more each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
