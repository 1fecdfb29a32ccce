"""The device's queue in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from blocks.protocol.device import JobPriority, JobResult, LeaseKey, ReleaseJob, SpanJob
from netsim.arithmetic import Arithmetic, ArithmeticRunner, part_of
from netsim.compute import DEVICES, DeviceClass, seconds
from netsim.devices import LOOK_AGAIN_S, SimDevice
from netsim.loop import run
from netsim.ports import Condition
from routing.types import Span

MODEL = Arithmetic(4, 4)
COST = DEVICES["demo-cpu"]
LONG_S = 10.0


def device(condition: Condition | None = None, cost: DeviceClass = COST) -> SimDevice:
    made = SimDevice(cost, ArithmeticRunner(MODEL), condition)
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


async def took_s_while(
    condition: Condition, slow_factor: float, factor_then: float, then_s: float
) -> tuple[float, JobResult, float]:
    """When a job of `LONG_S` ends, its result, and how long its device was busy."""
    condition.slow_factor = slow_factor
    made = device(condition, replace(COST, overhead_s=LONG_S))
    asyncio.get_running_loop().call_later(then_s, setattr, condition, "slow_factor", factor_then)
    ((took_s, result),) = await results(made, window(b"a"))
    return took_s, result, made.busy_s


@pytest.mark.parametrize(("slow_factor", "factor_then"), [(8.0, 1.0), (1.0, 8.0), (8.0, 80.0), (0.5, 4.0)])
def test_the_rest_of_a_long_job_goes_as_fast_as_its_machine_does_by_then(
    slow_factor: float, factor_then: float
) -> None:
    async def scene() -> None:
        at_once_s, then_s = LONG_S, 3.7
        took_s, result, busy_s = await took_s_while(Condition(), slow_factor, factor_then, then_s)
        exact_s = then_s + (at_once_s - then_s / slow_factor) * factor_then
        late_s = LOOK_AGAIN_S * abs(1 - factor_then / slow_factor)
        assert abs(took_s - exact_s) <= late_s + 0.1
        assert result.seconds == busy_s
        assert round(took_s, 6) == round(result.seconds, 6)

    run(scene())


def test_a_machine_that_stays_as_it_is_changes_no_bit_of_a_jobs_time_however_long_it_is() -> None:
    async def scene() -> None:
        for slow_factor in (1.0, 3.1):
            took_s, result, _ = await took_s_while(Condition(), slow_factor, slow_factor, 3.7)
            expected_s = seconds(replace(COST, overhead_s=LONG_S), window(b"a")) * slow_factor
            assert result.seconds == expected_s
            assert round(took_s, 9) == round(expected_s, 9)

    run(scene())


def test_a_job_that_is_over_before_its_machine_is_looked_at_again_keeps_the_speed_that_it_found() -> None:
    async def scene() -> None:
        condition = Condition()
        made = device(condition)
        slow_factor = LOOK_AGAIN_S / seconds(COST, window(b"a")) * 0.99
        condition.slow_factor = slow_factor
        asyncio.get_running_loop().call_later(0.1, setattr, condition, "slow_factor", 1.0)
        ((_, result),) = await results(made, window(b"a"))
        assert condition.slow_factor == 1.0
        assert result.seconds == seconds(COST, window(b"a")) * slow_factor

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
