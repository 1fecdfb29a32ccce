"""How fast the fabric is with a sink in place of nodes, and what a connection costs: the figures of `python -m netsim bench`.

Knows of the simulator only loop, fabric and trace. The load is drawn from one seed: hosts that dial each other and exchange small
messages and decode windows, over idle cards and over contended ones.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - a seeded generator, never the global one
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from netsim.fabric import Card, Fabric, Path
from netsim.loop import VirtualLoop, run
from netsim.trace import Trace
from overlay.multiaddr import tcp_address

PORT = 4001
MESSAGE_BYTES, WINDOW_BYTES = 200, 16 << 10
MBIT = 125_000.0


@dataclass(frozen=True, slots=True)
class SinkFigures:
    """What one run of the load took. Events are arrivals, turns of cards, time-outs and dials."""

    hosts: int
    connections: int
    events: int
    cpu_s: float
    virtual_s: float
    delivered_bytes: int
    digest: str

    @property
    def events_per_s(self) -> float:
        """Of one core."""
        return self.events / self.cpu_s


class Sink(asyncio.BufferedProtocol):
    """Counts what it hears, and answers nothing."""

    ring = memoryview(bytearray(256 << 10))

    def __init__(self) -> None:
        self.count = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.ring

    def buffer_updated(self, nbytes: int) -> None:
        self.count += nbytes


def measure_events(hosts: int = 100, dials: int = 8, rounds: int = 60, card: Card | None = None) -> SinkFigures:
    """Every host dials ``dials`` others and sends each a small message and a window, ``rounds`` times."""
    return run(_load(hosts, dials, rounds, card or Card()))


async def _load(hosts: int, dials: int, rounds: int, card: Card) -> SinkFigures:
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    trace, draws = Trace(loop.time), random.Random(1)
    fabric = Fabric(trace, draws, Path(delay_s=0.02))
    accepted: list[Sink] = []

    def accept() -> Sink:
        accepted.append(Sink())
        return accepted[-1]

    names = [f"host-{number}" for number in range(hosts)]
    for number, name in enumerate(names):
        fabric.add_host(name, _address(number), card)
        await fabric.transport(name).listen(tcp_address(_address(number), PORT), accept)
    began_s, began = loop.time(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for number in range(hosts):
            others = [(number + 1 + draws.randrange(hosts - 1)) % hosts for _ in range(dials)]
            group.create_task(_talk(fabric, names[number], others, rounds, draws))
    await asyncio.sleep(60)
    cpu_s = time.process_time() - began
    delivered = sum(sink.count for sink in accepted)
    return SinkFigures(hosts, hosts * dials, fabric.events, cpu_s, loop.time() - began_s, delivered, trace.hexdigest())


async def _talk(fabric: Fabric, name: str, others: list[int], rounds: int, draws: random.Random) -> None:
    small, window = bytes(MESSAGE_BYTES), bytes(WINDOW_BYTES)
    pipes: list[asyncio.Transport] = []
    for other in others:
        sink = cast(Sink, await fabric.transport(name).dial(tcp_address(_address(other), PORT), Sink))
        assert sink.transport is not None
        pipes.append(sink.transport)
    for _ in range(rounds):
        for pipe in pipes:
            pipe.write(small)
            pipe.write(window)
        await asyncio.sleep(draws.uniform(0.05, 0.15))


def measure_memory(connections: int = 2000) -> float:
    """Bytes of the fabric's own for each end of an idle connection over which something was said."""
    return run(_memory(connections))


async def _memory(connections: int) -> float:
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    fabric = Fabric(Trace(loop.time), random.Random(1), Path(delay_s=0.02))
    sinks: list[Sink] = []

    def sink() -> Sink:
        sinks.append(Sink())
        return sinks[-1]

    for number in range(2):
        fabric.add_host(f"host-{number}", _address(number))
    await fabric.transport("host-1").listen(tcp_address(_address(1), PORT), sink)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    bare = [Sink() for _ in range(2 * connections)]
    of_sinks = tracemalloc.get_traced_memory()[0] - before
    del bare
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(connections):
        made = cast(Sink, await fabric.transport("host-0").dial(tcp_address(_address(1), PORT), sink))
        assert made.transport is not None
        made.transport.write(bytes(MESSAGE_BYTES))
    await asyncio.sleep(10)
    for made in sinks:
        assert made.transport is not None
        made.transport.write(bytes(MESSAGE_BYTES))
    await asyncio.sleep(10)
    took = tracemalloc.get_traced_memory()[0] - before - of_sinks
    tracemalloc.stop()
    return took / (2 * connections)


def measure_resident(peak_bytes: Callable[[], float], connections: int = 4000) -> float:
    """Bytes that the process grows by for each end of a connection, its sink and Python's own losses among them.

    By the peak as the system knows it, so this only tells something before anything larger ran in the process.
    """
    return run(_resident(peak_bytes, connections))


async def _resident(peak_bytes: Callable[[], float], connections: int) -> float:
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    fabric = Fabric(Trace(loop.time), random.Random(1), Path(delay_s=0.02))
    for number in range(2):
        fabric.add_host(f"host-{number}", _address(number))
    await fabric.transport("host-1").listen(tcp_address(_address(1), PORT), Sink)
    before = peak_bytes()
    for _ in range(connections):
        made = cast(Sink, await fabric.transport("host-0").dial(tcp_address(_address(1), PORT), Sink))
        assert made.transport is not None
        made.transport.write(bytes(MESSAGE_BYTES))
    await asyncio.sleep(10)
    return (peak_bytes() - before) / (2 * connections)


def _address(number: int) -> str:
    return f"20.{number >> 8}.{number & 255}.1"
