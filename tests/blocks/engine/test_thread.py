"""The device's thread: order, bounds, hand-over to the loop, and the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from blocks.engine import limits
from blocks.engine.runner import Runner
from blocks.engine.thread import DeviceThread
from blocks.protocol.device import EmbedJob, Job, JobPriority, JobResult, LeaseKey, ReleaseJob, SpanJob
from overlay.rpc.types import Part
from routing.types import Span

HIDDEN = Part("hidden", "float32", (1, 1), bytes(4))


def embed(token: int, priority: JobPriority = JobPriority.DECODE) -> EmbedJob:
    return EmbedJob("none", (token,), 0, priority)


def window(session: bytes, position: int, priority: JobPriority) -> SpanJob:
    return SpanJob("none", LeaseKey(session * 16, 0), Span(0, 1), position, 1, HIDDEN, 8, priority=priority)


def with_device(scene: Callable[[DeviceThread], Awaitable[None]]) -> None:
    async def main() -> None:
        device = DeviceThread(torch_threads=1)
        device.start()
        try:
            async with asyncio.timeout(30):
                await scene(device)
        finally:
            device.stop()

    asyncio.run(main())


class Gate:
    """Work that holds the device until it is opened."""

    def __init__(self, device: DeviceThread) -> None:
        self._open = threading.Event()
        self._entered = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait(runner: Runner) -> None:
            loop.call_soon_threadsafe(self._entered.set)
            self._open.wait(20)

        self._done = device.call(wait)

    async def wait_entered(self) -> None:
        await self._entered.wait()

    async def open(self) -> None:
        self._open.set()
        await self._done


async def order_of(device: DeviceThread, jobs: list[Job]) -> list[Job]:
    """In which order the device finishes jobs that all wait at once."""
    gate, finished, over = Gate(device), list[Job](), asyncio.Event()

    def done(result: JobResult) -> None:
        finished.append(result.job)
        if len(finished) == len(jobs):
            over.set()

    await gate.wait_entered()
    for job in jobs:
        device.submit((job,), done)
    await gate.open()
    await over.wait()
    return finished


def test_decode_runs_before_prefill_and_that_before_background() -> None:
    async def scene(device: DeviceThread) -> None:
        background, prefill, decode = embed(1, JobPriority.BACKGROUND), embed(2, JobPriority.PREFILL), embed(3)
        assert await order_of(device, [background, prefill, decode]) == [decode, prefill, background]

    with_device(scene)


def test_jobs_of_one_lease_keep_their_order_whatever_their_priority() -> None:
    async def scene(device: DeviceThread) -> None:
        prompt, step = window(b"a", 0, JobPriority.PREFILL), window(b"a", 1, JobPriority.DECODE)
        other, release = window(b"b", 0, JobPriority.DECODE), ReleaseJob(LeaseKey(b"a" * 16, 0))
        assert await order_of(device, [prompt, step, release, other]) == [other, prompt, step, release]
        # once they are done, the lease is as urgent as its next job again
        assert await order_of(device, [embed(1, JobPriority.PREFILL), step]) == [step, embed(1, JobPriority.PREFILL)]

    with_device(scene)


def test_results_come_on_the_loops_thread_with_the_very_job() -> None:
    async def scene(device: DeviceThread) -> None:
        got: asyncio.Future[tuple[JobResult, int]] = asyncio.get_running_loop().create_future()
        job = embed(1)
        device.submit((job,), lambda result: got.set_result((result, threading.get_ident())))
        result, thread = await got
        assert result.job is job
        assert result.error is not None
        assert result.error.code == "not-served"
        assert thread == threading.get_ident()
        assert (device.step_count, device.queue_depth) == (1, 0)

    with_device(scene)


def test_a_full_queue_says_busy_and_still_takes_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICE_QUEUE_JOBS", 3)

    async def scene(device: DeviceThread) -> None:
        results = await order_of_results(device, [*(embed(index) for index in range(4)), ReleaseJob(LeaseKey(b"", 0))])
        busy = [result.job for result in results if result.error is not None and result.error.code == "busy"]
        assert busy == [embed(2), embed(3)]  # the gate is the third in the queue
        assert any(isinstance(result.job, ReleaseJob) and result.error is None for result in results)

    with_device(scene)


async def order_of_results(device: DeviceThread, jobs: list[Job]) -> list[JobResult]:
    gate, results, over = Gate(device), list[JobResult](), asyncio.Event()

    def done(result: JobResult) -> None:
        results.append(result)
        if len(results) == len(jobs):
            over.set()

    await gate.wait_entered()
    device.submit(jobs, done)
    await gate.open()
    await over.wait()
    return results


def test_a_callback_that_raises_does_not_strand_the_results_behind_it() -> None:
    async def scene(device: DeviceThread) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        over = asyncio.Event()

        def done(result: JobResult) -> None:
            assert isinstance(result.job, EmbedJob)
            if result.job.tokens == (5,):
                over.set()
            raise ValueError("a listener's bug")

        gate = Gate(device)
        await gate.wait_entered()
        device.submit([embed(index) for index in range(6)], done)
        await gate.open()
        await over.wait()

    with_device(scene)


def test_owned_work_hands_its_failure_to_its_caller_and_the_device_lives_on() -> None:
    async def scene(device: DeviceThread) -> None:
        def broken(runner: Runner) -> None:
            raise OSError("a disk")

        with pytest.raises(OSError, match="a disk"):
            await device.call(broken)
        assert len(await order_of(device, [embed(1)])) == 1

    with_device(scene)


def test_stopping_ends_the_thread() -> None:
    before = threading.active_count()
    with_device(lambda device: device.call(lambda runner: None))
    assert threading.active_count() == before
