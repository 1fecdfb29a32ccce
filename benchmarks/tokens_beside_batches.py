"""What a token of a session waits for while the same device trains: the demo model's blocks, tokens on a beat, batches in a row.

In one process, straight at the device: no sockets, no other daemon. Prints milliseconds from a token's submission to its result.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import torch

from blocks.engine.parts import part_of
from blocks.engine.runner import Runner
from blocks.engine.thread import DeviceThread
from blocks.model.source import resolve
from blocks.model.span import load_span
from blocks.protocol.call_queue import PIECE_TOKENS
from blocks.protocol.device import BackwardJob, Batch, Job, JobResult, LeaseKey, SpanJob
from routing.types import Span

KEY = "demo"
WHOLE = Span(0, 12)
ROW_TOKENS = 128
TOKENS = 200
BEAT_S = 0.02
SEED = 5


async def result_of(device: DeviceThread, job: Job) -> JobResult:
    """One job, awaited."""
    done: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
    device.submit((job,), lambda result: None if done.done() else done.set_result(result))
    result = await done
    if result.error is not None:
        raise result.error
    return result


async def token_waits(device: DeviceThread, width: int) -> list[float]:
    """Milliseconds of each token of one session."""
    hidden = part_of(torch.randn((1, width), generator=torch.Generator().manual_seed(SEED)))
    lease, waits = LeaseKey(bytes(16), 0), []
    for position in range(TOKENS):
        started = time.perf_counter()
        await result_of(device, SpanJob(KEY, lease, WHOLE, position, 1, hidden, TOKENS))
        waits.append(1e3 * (time.perf_counter() - started))
        await asyncio.sleep(BEAT_S)
    return waits


async def pieces(device: DeviceThread, width: int, took: list[float]) -> None:
    """Whole pieces of backward calls, one after the other, until cancelled."""
    shape = (PIECE_TOKENS // ROW_TOKENS, ROW_TOKENS, width)
    hidden = part_of(torch.randn(shape, generator=torch.Generator().manual_seed(SEED)))
    while True:
        took.append((await result_of(device, BackwardJob(KEY, WHOLE, Batch(hidden), hidden))).seconds)


def told(name: str, waits: list[float]) -> str:
    """One line of the table."""
    p99 = statistics.quantiles(waits, n=100)[98]
    return f"  {name:<32} p50 {statistics.median(waits):7.1f} ms   p99 {p99:7.1f} ms   max {max(waits):7.1f} ms"


async def run() -> None:
    """Measure alone, then beside pieces."""
    span = load_span(resolve("demo"), WHOLE.start, WHOLE.end)
    span.prepare_steps()

    def runner() -> Runner:
        torch.set_num_threads(1)
        made = Runner(device.run_more_urgent)
        made.install_span(KEY, span)
        return made

    device = DeviceThread(make_runner=runner)
    device.start()
    try:
        print(told("tokens alone", await token_waits(device, span.width)))
        took: list[float] = []
        training = asyncio.create_task(pieces(device, span.width, took), name="pieces")
        waits = await token_waits(device, span.width)
        training.cancel()
        await asyncio.wait([training])
        print(told(f"beside pieces of {PIECE_TOKENS} tokens", waits))
        print(f"  such a piece, forward and backward, takes {statistics.median(took):.2f} s")
    finally:
        device.stop()


def main() -> None:
    """Print the table."""
    asyncio.run(run())


if __name__ == "__main__":
    main()
