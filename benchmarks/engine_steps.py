"""Steps per second without a network: local `transformers`, the runner's jobs, and a daemon's own parts driving themselves.

The last arm is the whole token path but the sockets: driver machine, hop machine, the device's thread and both wake-ups. One
torch thread; arms are interleaved and the medians of ratios taken round by round. Also prints the hand-over of an empty job.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.swarm_steps import PROMPT, STEPS, local_loop
from blocks.demo import MODEL_DIRECTORY
from blocks.engine.runner import Runner
from blocks.engine.thread import DeviceThread
from blocks.model.head import load_head
from blocks.model.source import resolve
from blocks.model.span import load_span
from blocks.protocol.device import EmbedJob, Job, JobResult, LeaseKey, ReleaseJob, SampleJob, SpanJob
from blocks.sampling_params import SamplingParams
from peerd.decoding import DecodeRequest
from routing.types import Span
from tests.models import make_tiny
from tests.ring import KEY, Listener, Plans, Ring, route

ROUNDS = 7
HAND_OVERS = 2000


def runner_loop(directory: Path) -> Callable[[], float]:
    """The jobs of a token, run one after the other where they are called."""
    source = resolve(str(directory))
    runner, blocks = Runner(), source.blocks
    runner.install_span(KEY, load_span(source, 0, blocks))
    runner.install_head(KEY, load_head(source))
    lease = LeaseKey(b"b" * 16, 0)

    def do(job: Job) -> JobResult:
        result = runner.run(job)
        if result.error is not None:
            raise result.error
        return result

    def run() -> float:
        result, position, started = do(EmbedJob(KEY, tuple(PROMPT), 0)), 0, 0.0
        for step in range(STEPS):
            assert result.hidden is not None
            count = result.hidden.shape[0]
            result = do(SpanJob(KEY, lease, Span(0, blocks), position, count, result.hidden, len(PROMPT) + STEPS, 1))
            position += count
            assert result.hidden is not None
            result = do(SampleJob(KEY, result.hidden, SamplingParams(), position))
            if step == 0:
                started = time.perf_counter()
        return (STEPS - 1) / (time.perf_counter() - started)

    return run


async def hand_over_us() -> float:
    """Loop to device thread and back, with a job that does nothing: the median in microseconds."""
    device = DeviceThread(torch_threads=1)
    device.start()
    job, loop = ReleaseJob(LeaseKey(b"h" * 16, 0)), asyncio.get_running_loop()
    times = []
    for _ in range(HAND_OVERS):
        back: asyncio.Future[JobResult] = loop.create_future()
        started = time.perf_counter()
        device.submit((job,), back.set_result)
        await back
        times.append(time.perf_counter() - started)
    device.stop()
    return statistics.median(times) * 1e6


async def own_steps(ring: Ring) -> Callable[[], asyncio.Future[float]]:
    """A node that drives itself; each call is one generation, first token to last."""
    blocks = ring.source.blocks
    node = await ring.node(0, blocks, drives=True)
    pool = await ring.pool(node, Plans([route(node.hop())]))
    request = DecodeRequest(tuple(PROMPT), SamplingParams(), STEPS, ignore_eos=True)

    async def run() -> float:
        listener = Listener()
        decode = pool.start(ring.model(), request, listener)
        await listener.ended()
        return decode.tokens_per_s() or 0.0

    return lambda: asyncio.ensure_future(run())


async def measure(directory: Path) -> None:
    """Print the table for one model."""
    torch.set_num_threads(1)
    local, direct = local_loop(directory), runner_loop(directory)
    rows: list[tuple[float, float, float]] = []
    async with Ring(directory, threads=True, traced=True) as ring:
        own = await own_steps(ring)
        await own()
        local(), direct()
        for _ in range(ROUNDS):
            rows.append((local(), direct(), await own()))
    for index, name in enumerate(("local transformers", "our engine, one span", "a node drives itself")):
        rate = statistics.median(row[index] for row in rows)
        ratio = statistics.median(row[index] / row[0] for row in rows)
        print(f"  {name:<24}{rate:8.1f} steps/s  {ratio:5.2f} of local")


def main() -> None:
    """The hand-over, then the tiny Llama and the demo model."""
    print(f"  hand-over of an empty job: {asyncio.run(hand_over_us()):.0f} us")
    with tempfile.TemporaryDirectory() as folder:
        print("tiny Llama, hidden 256, 8 blocks")
        asyncio.run(measure(make_tiny("benchmark", Path(folder))))
    print("demo model, 12 blocks")
    asyncio.run(measure(MODEL_DIRECTORY))


if __name__ == "__main__":
    main()
