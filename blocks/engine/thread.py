"""The device's thread: the one place where torch computes, behind a bounded queue by priority.

Owns the thread, the queue and the hand-over back to the loop. Waking up is what a token pays for here: the thread blocks in a C queue
that `submit` feeds (no polling), and completions that pile up share one wake-up of the loop. Imports torch only in the
thread, so that a daemon's socket answers while torch loads.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol, cast

from blocks.engine import limits
from blocks.engine.errors import DeviceBusy
from blocks.protocol.device import Job, JobPriority, JobResult, ReleaseJob, SpanJob

if TYPE_CHECKING:
    from blocks.engine.runner import Runner

Done = Callable[[JobResult], None]
Work = Callable[["Runner"], None]


class JobRunner(Protocol):
    """What the thread needs of a runner."""

    def run(self, job: Job) -> JobResult: ...


class DeviceThread:
    """A `Device`; use `start` and `stop` from the loop's thread.

    Jobs of one lease run in the order of submission: a later one is never more urgent than an earlier one that waits. A batch
    (`JobPriority.BACKGROUND`) lets sessions' jobs in between its blocks: `run_more_urgent`.
    """

    def __init__(self, torch_threads: int | None = None, *, make_runner: Callable[[], JobRunner] | None = None) -> None:
        """``make_runner`` is called in the thread and replaces the one of torch (a benchmark's does no work)."""
        self._torch_threads = torch_threads
        self._make_runner = make_runner or self._torch_runner
        self._lock = threading.Lock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._heap: list[tuple[int, int, Job | Work, Done | None]] = []
        self._waiting: dict[tuple[bytes, int], tuple[int, int]] = {}
        """Per lease: how many jobs wait or run, and the least urgent priority among them."""
        self._count = 0
        self._depth = 0
        self._steps = 0
        self._stopping = False
        self._completed: deque[tuple[JobResult, Done]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._runner: JobRunner | None = None

    @property
    def step_count(self) -> int:
        return self._steps

    @property
    def queue_depth(self) -> int:
        return self._depth

    def start(self) -> None:
        """Start the thread; jobs wait until torch is imported."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the job that runs; what waits is not run.

        A thread that is long at it (torch's import, a large prefill) is left to itself after `STOP_JOIN_S`: its process ends without it.
        """
        self._stopping = True
        self._wake.put(None)
        if self._thread is not None:
            self._thread.join(limits.STOP_JOIN_S)
            self._thread = None

    def submit(self, jobs: Sequence[Job], done: Done) -> None:
        """See `Device.submit`."""
        for job in jobs:
            if self._depth >= limits.DEVICE_QUEUE_JOBS and not isinstance(job, ReleaseJob):
                assert self._loop is not None
                self._loop.call_soon(
                    done, JobResult(job, error=DeviceBusy("The device's queue is full; try again later."))
                )
                continue
            priority = JobPriority.DECODE if isinstance(job, ReleaseJob) else job.priority
            self._push(priority, job, done)

    def call(self, work: Work) -> asyncio.Future[None]:
        """Run ``work(runner)`` in the thread between jobs (to install or remove a model); await its end."""
        assert self._loop is not None, "start the device first"
        loop, future = self._loop, self._loop.create_future()

        def run(runner: Runner) -> None:
            error: BaseException | None = None
            try:
                work(runner)
            except Exception as caught:  # noqa: BLE001 - supervision: whatever loading a model raises goes to its caller
                error = caught
            loop.call_soon_threadsafe(settle, error)

        def settle(error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        self._push(JobPriority.BACKGROUND, run, None)
        return future

    def _push(self, priority: int, work: Job | Work, done: Done | None) -> None:
        lease = _lease_of(work)
        with self._lock:
            if lease is not None:
                waiting, least_urgent = self._waiting.get(lease, (0, priority))
                priority = max(priority, least_urgent)
                self._waiting[lease] = (waiting + 1, priority)
            self._count += 1
            self._depth += 1
            heappush(self._heap, (priority, self._count, work, done))
        self._wake.put(None)

    # --- the thread ---

    def _torch_runner(self) -> Runner:
        import torch

        from blocks.engine.runner import Runner

        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        return Runner(self.run_more_urgent)

    def run_more_urgent(self) -> None:
        """From within a batch, in the device's thread: do the sessions' jobs that wait, so that a token waits for a block of it at most."""
        while self._runner is not None:
            with self._lock:
                if not self._heap or self._heap[0][0] >= JobPriority.BACKGROUND:
                    return
                _, _, work, done = heappop(self._heap)
            self._wake.get()  # its own, or one that is as good; at most a moment away
            assert done is not None and not callable(work), "only a model is loaded without a result, in the background"
            self._run(self._runner, work, done)

    def _main(self) -> None:
        runner = self._runner = self._make_runner()
        while True:
            self._wake.get()
            if self._stopping:
                return
            with self._lock:
                _, _, work, done = heappop(self._heap)
            if done is None:
                assert callable(work)
                work(cast("Runner", runner))
                with self._lock:
                    self._depth -= 1
                continue
            assert not callable(work)
            self._run(runner, work, done)

    def _run(self, runner: JobRunner, job: Job, done: Done) -> None:
        result = runner.run(job)
        self._finished(job)
        self._complete(result, done)

    def _finished(self, job: Job) -> None:
        self._steps += 1
        lease = _lease_of(job)
        with self._lock:
            self._depth -= 1
            if lease is not None:
                waiting, least_urgent = self._waiting[lease]
                if waiting > 1:
                    self._waiting[lease] = (waiting - 1, least_urgent)
                else:
                    del self._waiting[lease]

    def _complete(self, result: JobResult, done: Done) -> None:
        """Hand over; a wake-up that is already on its way takes this one along."""
        self._completed.append((result, done))
        if len(self._completed) == 1 and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        try:
            for _ in range(len(self._completed)):
                result, done = self._completed.popleft()
                done(result)
        finally:  # also after a callback that raised: nothing else would wake the loop for what is left
            if self._completed and self._loop is not None:
                self._loop.call_soon(self._deliver)


def _lease_of(work: object) -> tuple[bytes, int] | None:
    return (work.lease.session, work.lease.hop_index) if isinstance(work, SpanJob | ReleaseJob) else None
