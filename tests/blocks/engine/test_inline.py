"""The device without a thread."""

from __future__ import annotations

import asyncio

from blocks.engine.inline import InlineDevice
from blocks.engine.runner import Runner
from blocks.protocol.device import EmbedJob, JobResult


def test_results_come_in_order_and_never_from_within_submit() -> None:
    async def main() -> None:
        device, results, over = InlineDevice(Runner()), list[JobResult](), asyncio.Event()

        def done(result: JobResult) -> None:
            results.append(result)
            if len(results) == 2:
                over.set()

        jobs = [EmbedJob("none", (index,), 0) for index in range(2)]
        device.submit(jobs, done)
        assert (results, device.queue_depth) == ([], 2)
        async with asyncio.timeout(5):
            await over.wait()
        assert [result.job for result in results] == jobs
        assert (device.step_count, device.queue_depth) == (2, 0)

    asyncio.run(main())
