"""A device in virtual time: a queue by priority in front of a runner, jobs that take what the cost model says.

Owns the queue and what a machine's condition does to it (slow, full, lying); the numbers are the runner's (arithmetic, zeros, or
torch), the seconds `netsim.compute`'s.
Jobs end by timers of the loop, in the context of the host that submitted them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from heapq import heappop, heappush
from typing import Any, Protocol

from blocks.engine import limits
from blocks.engine.errors import DeviceBusy
from blocks.protocol.device import BackwardJob, ForwardJob, Job, JobPriority, JobResult, LeaseKey, ReleaseJob, SpanJob
from netsim import compute
from netsim.arithmetic import PRIME, integers_of, part_of
from netsim.ports import Condition

Done = Callable[[JobResult], None]

LOOK_AGAIN_S = 1.0
"""So long does a job keep the speed of the machine that it found; the rest of it goes as fast as the machine does by then."""


class Lie(Enum):
    """How a device is wrong."""

    NUMBERS = "numbers"
    """Every value is off by one."""
    SHAPE = "shape"
    """There is a row too many."""
    NAN = "nan"
    """Not a number, everywhere."""


class JobRunner(Protocol):
    """What computes: `netsim.arithmetic`'s runners, `blocks.engine.runner.Runner`."""

    def run(self, job: Job) -> JobResult: ...


class SimDevice:
    """`blocks.protocol.device.OwnDevice`; see the module. ``condition`` is looked at with every job that begins, and while it runs."""

    def __init__(self, cost: compute.DeviceClass, runner: JobRunner, condition: Condition | None = None) -> None:
        self.cost = cost
        self.runner = runner
        self.condition = condition or Condition()
        self.step_count = 0
        self.busy_s = 0.0
        """How long it has computed, in all."""
        self._heap: list[tuple[int, int, Job | Callable[[Any], None], Any]] = []
        self._waiting: dict[tuple[bytes, int], tuple[int, int]] = {}
        """Per lease: how many jobs wait or run, and the least urgent priority among them."""
        self._leases: dict[LeaseKey, None] = {}
        """Those that have KV here."""
        self._count = 0
        self._running = False
        self._started = False
        self._stopped = False

    @property
    def queue_depth(self) -> int:
        return len(self._heap) + self._running

    @property
    def leases(self) -> tuple[LeaseKey, ...]:
        """Those that have KV here."""
        return tuple(self._leases)

    def start(self) -> None:
        """Jobs that came before run now."""
        self._started = True
        self._next()

    def stop(self) -> None:
        """What waits is not run."""
        self._stopped = True
        self._heap.clear()

    def submit(self, jobs: Sequence[Job], done: Done) -> None:
        """See `Device.submit`."""
        for job in jobs:
            if self.queue_depth >= limits.DEVICE_QUEUE_JOBS and not isinstance(job, ReleaseJob):
                busy = JobResult(job, error=DeviceBusy("The device's queue is full; try again later."))
                asyncio.get_running_loop().call_soon(done, busy)
                continue
            self._push(JobPriority.DECODE if isinstance(job, ReleaseJob) else job.priority, job, done)
        self._next()

    def call(self, work: Callable[[Any], None]) -> asyncio.Future[None]:
        """See `OwnDevice.call`; takes no time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._push(JobPriority.BACKGROUND, work, future)
        self._next()
        return future

    def _push(self, priority: int, work: Job | Callable[[Any], None], done: object) -> None:
        lease = _lease_of(work)
        if lease is not None:  # jobs of one lease run in the order of submission
            waiting, least_urgent = self._waiting.get(lease, (0, priority))
            priority = max(priority, least_urgent)
            self._waiting[lease] = (waiting + 1, priority)
        self._count += 1
        heappush(self._heap, (priority, self._count, work, done))

    def _next(self) -> None:
        if self._running or self._stopped or not self._started or not self._heap:
            return
        _, _, work, done = heappop(self._heap)
        loop = asyncio.get_running_loop()
        self._running = True
        if callable(work):
            loop.call_soon(self._call, work, done)
            return
        factor = self.condition.slow_factor
        self._go_on(work, done, loop.time(), compute.seconds(self.cost, work) * factor, factor)

    def _go_on(self, job: Job, done: Done, began_s: float, took_s: float, factor: float) -> None:
        """Let a job, which takes ``took_s`` in all if the machine stays as slow as ``factor`` says, run until it ends or for a while.

        Its end is reckoned from its beginning, so that looking again changes no bit of it where the machine is as it was.
        """
        loop = asyncio.get_running_loop()
        ran_s = loop.time() - began_s
        if self.condition.slow_factor != factor:
            left_s = max(0.0, took_s - ran_s) / factor
            factor = self.condition.slow_factor
            took_s = ran_s + left_s * factor
        if took_s - ran_s > LOOK_AGAIN_S:
            loop.call_later(LOOK_AGAIN_S, self._go_on, job, done, began_s, took_s, factor)
        else:
            self.busy_s += took_s
            loop.call_at(began_s + took_s, self._finish, job, done, took_s)

    def _call(self, work: Callable[[Any], None], future: asyncio.Future[None]) -> None:
        self._running = False
        try:
            work(self.runner)
        except Exception as error:  # noqa: BLE001 - as the real device does: whatever loading raises goes to its caller
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(None)
        self._next()

    def _finish(self, job: Job, done: Done, took_s: float) -> None:
        self._running = False
        lease = _lease_of(job)
        if lease is not None:
            waiting, least_urgent = self._waiting[lease]
            if waiting > 1:
                self._waiting[lease] = (waiting - 1, least_urgent)
            else:
                del self._waiting[lease]
        if self._stopped:
            return
        self.step_count += 1
        result = replace(self._result(job), seconds=took_s)
        self._next()
        done(result)

    def _result(self, job: Job) -> JobResult:
        condition = self.condition
        if isinstance(job, SpanJob) and job.lease not in self._leases:
            if condition.is_memory_full:
                return JobResult(job, error=DeviceBusy("The device's memory is full; try again later or elsewhere."))
            self._leases[job.lease] = None
        elif isinstance(job, ReleaseJob):
            for lease in [known for known in self._leases if _place(known) == _place(job.lease)]:
                del self._leases[lease]
        result = self.runner.run(job)
        return lied(result, Lie(condition.lie)) if condition.lie else result


def lied(result: JobResult, lie: Lie) -> JobResult:
    """What a liar makes of an honest result of blocks; embeddings and samples are a node's own, and stay as they are."""
    hidden = result.hidden
    if hidden is None or not isinstance(result.job, SpanJob | ForwardJob | BackwardJob):
        return result
    if lie is Lie.NUMBERS:
        return replace(result, hidden=part_of((integers_of(hidden) + 1) % PRIME, hidden.name))
    if lie is Lie.NAN:
        return replace(result, hidden=replace(hidden, data=b"\x00\x00\xc0\x7f" * (hidden.size_bytes // 4)))
    rows, *rest = hidden.shape
    share = hidden.size_bytes // rows
    return replace(result, hidden=replace(hidden, shape=(rows + 1, *rest), data=bytes(hidden.data) + bytes(share)))


def _place(lease: LeaseKey) -> tuple[bytes, int]:
    return lease.session, lease.hop_index


def _lease_of(work: object) -> tuple[bytes, int] | None:
    return _place(work.lease) if isinstance(work, SpanJob | ReleaseJob) else None
