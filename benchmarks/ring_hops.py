"""Milliseconds that each hop adds to a token, and what they are spent on: real nodes as processes, identity blocks.

Every hop is a process with the real host, session service, hop machine and device thread; only the blocks compute nothing. The driver
is a real decode. The slope over rings of 1 to 4 hops is what a hop adds. Beside it stands the floor of the same run: bare asyncio
processes that pass the same bytes on with encryption, a signature made and checked, and msgpack.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import psutil

from benchmarks import bare_ring
from benchmarks.probes import LAYERS, Probes
from blocks.engine.thread import DeviceThread
from blocks.protocol.admission import Grant, Wish
from blocks.protocol.device import EmbedJob, Job, JobResult, LeaseKey, SampleJob, SpanJob
from blocks.protocol.hops import Hops, HopSettings
from blocks.sampling_params import SamplingParams
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.errors import PeerdError
from overlay.host import Host
from overlay.identity import Identity
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports
from overlay.rpc.types import Part
from overlay.transport.tcp import TcpTransport
from peerd.decoding import DecodeRequest, DecoderPool, DriverModel
from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock
from routing.types import ComputeClass, Hop, ModelId, Route, Span

KEY = "identity"
DTYPE = "float32"
HOPS_MAX = 4
ROUNDS = 4
SIZES = {"16 KiB": (4096, 150, 0.5), "1 MiB": (262144, 40, 5.0)}
"""Boundary: float32 values of one token, tokens per round, and the target in added milliseconds per hop."""
SECONDS_MAX = 120.0


class Memory(dict[str, bytes]):
    """`overlay.ports.Storage` that forgets."""

    def load(self, name: str) -> bytes | None:
        return self.get(name)

    def save(self, name: str, data: bytes) -> None:
        self[name] = data


class IdentityRunner:
    """Blocks that change nothing; every output is a part of its own, as a real one would be."""

    def __init__(self, width: int) -> None:
        self._first = bytes(width * 4)
        self._width = width

    def run(self, job: Job) -> JobResult:
        if isinstance(job, SpanJob):
            return JobResult(job, hidden=_again(job.hidden))
        if isinstance(job, SampleJob):
            return JobResult(job, hidden=_again(job.hidden), token=0)
        if isinstance(job, EmbedJob):
            return JobResult(job, hidden=Part("hidden", DTYPE, (1, self._width), self._first))
        return JobResult(job)


def _again(part: Part) -> Part:
    return Part(part.name, part.dtype, part.shape, part.data)


@dataclass
class Door:
    """Admission that lets everybody in."""

    width: int

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        return Grant(KEY, 4, 8 << 20, 1 << 20, self.width, DTYPE)

    def release(self, lease: LeaseKey) -> None:
        """Nothing was reserved."""


@dataclass
class Node:
    """What a process of the ring runs."""

    host: Host
    device: DeviceThread
    service: SpanService
    directory: SessionDirectory


@asynccontextmanager
async def node(width: int) -> AsyncIterator[Node]:
    """A node on a loopback port of the kernel's choice."""
    async with AsyncExitStack() as stack:
        clock, randomness = LoopClock(), SystemRandomness()
        ports = Ports(clock, SystemWallClock(), randomness, (TcpTransport(),), Memory())
        host = await stack.enter_async_context(Host(Identity(randomness.token(32)), ports))
        await host.listen(Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))
        device = DeviceThread(make_runner=lambda: IdentityRunner(width))
        device.start()
        stack.callback(device.stop)
        directory = SessionDirectory()
        hops = Hops(HopSettings(host.peer_id.multihash, randomness.token(16)), Door(width), device)
        service = await stack.enter_async_context(SpanService(host, device, hops, directory, clock))
        yield Node(host, device, service, directory)


async def serve(width: int, probed: bool) -> None:
    """A hop's process: says who and where it is; then each line asked is answered with the split since the last one."""
    probes = Probes()
    if probed:
        probes.install()
    async with node(width) as here:
        addresses = [str(address.without_peer()) for address in here.host.addresses]
        print(json.dumps([here.host.peer_id.multihash.hex(), addresses]), flush=True)
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        over = asyncio.Event()

        def readable() -> None:
            if not sys.stdin.readline():
                over.set()
            asked.set()

        loop.add_reader(sys.stdin.fileno(), readable)
        while not over.is_set():
            await asked.wait()
            asked.clear()
            if not over.is_set():
                print(json.dumps(probes.take()), flush=True)
        loop.remove_reader(sys.stdin.fileno())


@dataclass
class HopProcess:
    """One hop, seen from the driver's process."""

    process: subprocess.Popen[str]
    hop: Hop

    def split(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("split\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found

    def cpu_s(self) -> float:
        """Processor time so far, which a busy machine stretches less than it does the clock."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def start_hops(width: int, probed: bool) -> list[HopProcess]:
    """`HOPS_MAX` processes, hop i serving block i."""
    command = [sys.executable, "-m", "benchmarks.ring_hops", "--serve", str(width), *(["--probed"] if probed else [])]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(HOPS_MAX)
    ]
    found = []
    for index, process in enumerate(processes):
        assert process.stdout is not None
        peer, addresses = json.loads(process.stdout.readline())
        found.append(HopProcess(process, Hop(bytes.fromhex(peer), tuple(addresses), Span(index, index + 1))))
    return found


@dataclass
class Plan:
    """`Planner` with one answer."""

    route: Route

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        return self.route

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        raise error

    def praise(self, peers: Sequence[bytes]) -> None:
        """As hoped."""

    async def wait_changed(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


@dataclass
class Stopwatch:
    """Listener that notes when each token came."""

    clock: LoopClock = field(default_factory=LoopClock)
    times: list[float] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    error: PeerdError | None = None

    def on_token(self, token: int, logits: Part | None) -> bool:
        self.times.append(self.clock.now())
        return True

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        self.error = error or self.error

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        self.error = error or self.error
        self.over.set()

    async def steps_ms(self) -> list[float]:
        await self.over.wait()
        if self.error is not None:
            raise self.error
        skipped = 5  # streams are still opening
        return [1000 * (after - before) for before, after in zip(self.times[skipped:], self.times[skipped + 1 :])]  # noqa: B905


async def drive(pool: DecoderPool, plan: Plan, hops: Sequence[Hop], width: int, tokens: int) -> list[float]:
    """Milliseconds of each token of one session over ``hops``."""
    plan.route = Route(tuple(hops))
    model = DriverModel(KEY, ModelId(bytes(32)), ComputeClass("none", DTYPE), width, 1 << 20)
    watch = Stopwatch()
    pool.start(model, DecodeRequest((1,), SamplingParams(), tokens, ignore_eos=True), watch)
    return await watch.steps_ms()


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds of each token by the number of hops; of a middle hop's window, the split and the processor's time."""

    steps: list[list[float]]
    split: dict[str, float]
    cpu_ms: float


async def measure(width: int, tokens: int, *, probed: bool, rounds: int = ROUNDS) -> Measured:
    """Rings of 1 to `HOPS_MAX` hops, interleaved."""
    processes = start_hops(width, probed)
    steps: list[list[float]] = [[] for _ in processes]
    splits: list[dict[str, float]] = []
    cpu_s = 0.0
    try:
        async with asyncio.timeout(SECONDS_MAX), node(width) as here:
            plan = Plan(Route((processes[0].hop,)))
            pool = DecoderPool(
                here.host, here.service, here.directory, here.device, plan, LoopClock(), SystemRandomness(), 1
            )
            async with pool:
                for attempt in range(rounds + 1):
                    if attempt == 1:
                        cpu_s = processes[1].cpu_s()
                    for count in range(1, HOPS_MAX + 1):
                        hops = [process.hop for process in processes[:count]]
                        taken = await drive(pool, plan, hops, width, tokens)
                        found = processes[1].split()
                        if attempt:  # the first round warms up
                            steps[count - 1] += taken
                            if count > 1:
                                splits.append(found)
                cpu_s = processes[1].cpu_s() - cpu_s
    finally:
        for process in processes:
            process.stop()
    split = {layer: statistics.median(found[layer] for found in splits) for layer in LAYERS}
    return Measured(steps, split, 1000 * cpu_s / (rounds * (HOPS_MAX - 1) * tokens))


def slope(values: Sequence[float]) -> float:
    """Least squares over 1, 2, 3, ..."""
    return statistics.linear_regression(range(1, len(values) + 1), values).slope


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def report(name: str, width: int, tokens: int, target_ms: float) -> float:
    """Print one boundary's table; returns the milliseconds that a hop adds."""
    floor = bare_ring.measure(width * 4, tokens, HOPS_MAX, ROUNDS)
    plain = asyncio.run(measure(width, tokens, probed=False))
    probed = asyncio.run(measure(width, tokens, probed=True, rounds=3))
    split = probed.split
    print(f"\nring of processes, identity blocks, {name} boundary: ms a token, p50 (p99)")
    medians = [statistics.median(found) for found in plain.steps]
    floors = [statistics.median(found) for found in floor]
    for label, found in (("peerd", plain.steps), ("bare asyncio", floor)):
        cells = "   ".join(f"{statistics.median(each):6.2f} ({percentile(each, 99):6.2f})" for each in found)
        print(f"  {label:<14}{cells}      for 1 to {HOPS_MAX} hops")
    added, bare = slope(medians), slope(floors)
    verdict = "met" if added <= target_ms else "missed"
    print(f"  added per hop {added:6.3f} ms (target {target_ms} ms: {verdict}); bare asyncio floor {bare:6.3f} ms")
    print(f"  processor time of a hop's window {plain.cpu_ms:.3f} ms, on all threads")
    slowed = slope([statistics.median(found) for found in probed.steps])
    spent = "  ".join(f"{layer} {split[layer]:.3f}" for layer in LAYERS)
    rest = slowed - sum(split.values())
    other = "wake-ups and loopback" if rest >= 0 else "done while the next hop was at work already"
    print(f"  of the {slowed:.3f} ms that a probed hop adds: {spent}  {other} {rest:+.3f}")
    return added


def main(arguments: Sequence[str] = ()) -> None:
    """Both boundaries; or, asked for, one hop's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int, metavar="WIDTH")
    parser.add_argument("--probed", action="store_true")
    parser.add_argument("--size", choices=SIZES)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        asyncio.run(serve(chosen.serve, chosen.probed))
        return
    for name, (width, tokens, target_ms) in SIZES.items():
        if chosen.size in (None, name):
            report(name, width, tokens, target_ms)


if __name__ == "__main__":
    main(sys.argv[1:])
