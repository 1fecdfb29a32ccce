"""A `Device` without a thread: runs in `submit`, completes through the loop. For tests and the simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from blocks.engine.runner import Runner
from blocks.protocol.device import Job, JobResult


class InlineDevice:
    """See the module. ``done`` is called by the loop's next turn, never from within `submit`."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._steps = 0
        self._pending = 0

    @property
    def step_count(self) -> int:
        return self._steps

    @property
    def queue_depth(self) -> int:
        return self._pending

    def submit(self, jobs: Sequence[Job], done: Callable[[JobResult], None]) -> None:
        loop = asyncio.get_running_loop()
        for job in jobs:
            self._pending += 1
            loop.call_soon(self._finish, self.runner.run(job), done)

    def _finish(self, result: JobResult, done: Callable[[JobResult], None]) -> None:
        self._pending -= 1
        self._steps += 1
        done(result)
