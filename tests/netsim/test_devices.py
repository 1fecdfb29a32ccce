"""The device's queue in virtual time."""

from __future__ import annotations

import asyncio

from blocks.protocol.device import JobPriority, JobResult, LeaseKey, ReleaseJob, SpanJob
from netsim.arithmetic import Arithmetic, ArithmeticRunner, part_of
from netsim.compute import DEVICES, seconds
from netsim.devices import SimDevice
from netsim.loop import run
from netsim.ports import Condition
from routing.types import Span

MODEL = Arithmetic(4, 4)
COST = DEVICES["demo-cpu"]


def device(condition: Condition | None = None) -> SimDevice:
    made = SimDevice(COST, ArithmeticRunner(MODEL), condition)
    made.start()
    return made


def window(session: bytes, priority: JobPriority = JobPriority.DECODE, position: int = 0) -> SpanJob:
    hidden = part_of(MODEL.embed([5]))
    return SpanJob("m", LeaseKey(session * 16, 0), Span(0, 4), position, 1, hidden, 64, priority=priority)


async def results(made: SimDevice, *jobs: SpanJob | ReleaseJob) -> list[tuple[float, JobResult]]:
    """Each result, and when it came."""
    loop = asyncio.get_running_loop()
    await made.call(lambda runner: runner.install_span("m", Span(0, 4)))
    found: list[tuple[float, JobResult]] = []
    over = asyncio.Event()

    def done(result: JobResult) -> None:
        found.append((loop.time() - started, result))
        if len(found) == len(jobs):
            over.set()

    started = loop.time()
    made.submit(jobs, done)
    await over.wait()
    return found


def test_one_job_runs_at_a_time_and_takes_what_the_model_says() -> None:
    async def scene() -> None:
        found = await results(device(), window(b"a"), window(b"b"))
        once = seconds(COST, window(b"a"))
        assert [round(at / once, 6) for at, _ in found] == [1.0, 2.0]
        assert [result.seconds for _, result in found] == [once, once]

    run(scene())


def test_decode_goes_before_prefill_but_never_before_its_own_leases_earlier_job() -> None:
    async def scene() -> None:
        first = window(b"a", JobPriority.PREFILL)
        jobs = [window(b"c"), first, window(b"a", position=1), window(b"b")]
        found = await results(device(), *jobs)
        assert [result.job for _, result in found] == [jobs[0], jobs[3], jobs[1], jobs[2]]

    run(scene())


def test_a_slow_machine_takes_longer_from_its_next_job_on() -> None:
    async def scene() -> None:
        condition = Condition()
        made = device(condition)
        ((once, _),) = await results(made, window(b"a"))
        condition.slow_factor = 5.0
        ((later, _),) = await results(made, window(b"b"))
        assert round(later / once, 6) == 5.0

    run(scene())


def test_a_full_machine_takes_no_new_lease_and_goes_on_with_those_it_has() -> None:
    async def scene() -> None:
        condition = Condition()
        made = device(condition)
        await results(made, window(b"a"))
        condition.is_memory_full = True
        (_, old), (_, new) = await results(made, window(b"a", position=1), window(b"b"))
        assert old.error is None
        assert new.error is not None
        assert new.error.code == "busy"

    run(scene())


def test_a_liar_lies_in_the_way_it_was_told() -> None:
    async def scene() -> None:
        condition = Condition()
        made = device(condition)
        ((_, honest),) = await results(made, window(b"a"))
        for lie in ("numbers", "shape", "nan"):
            condition.lie = lie
            ((_, told),) = await results(made, window(b"a"))
            assert told.hidden is not None
            assert honest.hidden is not None
            assert (told.hidden.shape, bytes(told.hidden.data)) != (honest.hidden.shape, bytes(honest.hidden.data))

    run(scene())


def test_a_stopped_device_answers_nobody() -> None:
    async def scene() -> None:
        made = device()
        heard: list[JobResult] = []
        made.submit((window(b"a"), window(b"b")), heard.append)
        made.stop()
        await asyncio.sleep(1)
        assert heard == []

    run(scene())
