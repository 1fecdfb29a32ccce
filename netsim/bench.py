"""How fast the simulator is: fabric events with sinks in place of nodes, and calls through the whole overlay. `python -m netsim bench`.

A figure is per second of one core's own time; the best of some runs counts, since even that time runs slower on a crowded machine.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from typing import cast

from netsim.fabric import Card, Fabric, Path
from netsim.loop import VirtualLoop
from netsim.null_channel import cheap_signatures
from netsim.peers.bare import BarePeer
from netsim.report import table
from netsim.runner import peak_rss_mib
from netsim.sink_bench import MBIT, SinkFigures, measure_events, measure_memory, measure_resident
from netsim.trace import Trace
from netsim.world import World, generator

EVENTS_PER_S_MIN = 50_000.0
"""What the fabric must do with a sink in place of nodes."""
CALLS = 2_000
CALLS_AT_ONCE = 16
CALL_BYTES = 200
RUNS = 9
"""Of each load, in turn, after a smaller one to warm up; the fastest counts, since all that can be in the way is other work."""
LOADS = (
    ("fabric, idle cards", Card(), 30),
    ("fabric, cards of 1 Gbit/s", Card(1000 * MBIT, 1000 * MBIT), 30),
    ("fabric, uplinks of 20 Mbit/s", Card(20 * MBIT, 100 * MBIT), 3),
)
"""What it is, the cards, and how often everybody sends: about 50,000 events each."""


def measure_calls(*, is_noise: bool, calls: int = CALLS) -> float:
    """Unary calls per second of one core, between two hosts over one connection."""
    with nullcontext() if is_noise else cheap_signatures(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_calls(is_noise, calls))


async def _calls(is_noise: bool, calls: int) -> float:
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    trace, path = Trace(loop.time), Path(0.01)
    fabric = Fabric(trace, generator(1, "fabric"), path)
    world = World(1, loop, fabric, trace, lambda one, other: path, is_noise=is_noise)
    machines = [world.add_host(name, "bare") for name in ("asker", "asked")]
    for machine in machines:
        world.start(machine)
    await asyncio.sleep(1)
    asker, asked = (cast(BarePeer, machine.peer) for machine in machines)

    async def ask(count: int) -> None:
        for _ in range(count):
            if not await asker.call(asked, CALL_BYTES):
                raise RuntimeError("a call was answered wrongly")

    await world.on(machines[0], ask(10))
    began = time.process_time()
    async with asyncio.TaskGroup() as asking:
        for _ in range(CALLS_AT_ONCE):
            asking.create_task(world.on(machines[0], ask(calls // CALLS_AT_ONCE)))
    took_s = time.process_time() - began
    world.close()
    return calls / took_s


def measure_loads() -> list[list[SinkFigures]]:
    """Each of `LOADS` `RUNS` times, fastest first. The loads take turns, so that what else the machine does meets all of them."""
    for _, card, _ in LOADS:
        measure_events(hosts=20, rounds=10, card=card)
    found: list[list[SinkFigures]] = [[] for _ in LOADS]
    for _ in range(RUNS):
        for (_, card, rounds), figures in zip(LOADS, found, strict=True):
            figures.append(measure_events(rounds=rounds, card=card))
    return [sorted(figures, key=lambda one: -one.events_per_s) for figures in found]


def main() -> int:
    """Print the figures; 1 when the fabric is slower than it must be."""
    resident = measure_resident(lambda: peak_rss_mib() * (1 << 20))
    rows = [("a second of one core", "fastest", "median", f"of {RUNS} runs")]
    slowest = float("inf")
    for (label, _, _), figures in zip(LOADS, measure_loads(), strict=True):
        best, median = figures[0], figures[RUNS // 2]
        slowest = min(slowest, best.events_per_s)
        load = f"{best.events:,} events, {best.connections} connections, {best.delivered_bytes / 1e6:,.0f} MB delivered"
        rows.append((label, f"{best.events_per_s:,.0f}", f"{median.events_per_s:,.0f}", load))
    for label, is_noise in (("signed calls, Noise", True), ("signed calls, null channel", False)):
        rates = sorted((measure_calls(is_noise=is_noise) for _ in range(RUNS)), reverse=True)
        load = f"{CALLS_AT_ONCE} calls at once over one connection, both ends counted"
        rows.append((label, f"{rates[0]:,.0f}", f"{rates[RUNS // 2]:,.0f}", load))
    print("\n".join(table(rows, right=(1, 2), indent="")))
    of_fabric = measure_memory()
    print(
        f"one end of an idle connection: {of_fabric:,.0f} bytes of the fabric's own, {resident:,.0f} resident with its sink"
    )
    print(f"peak memory of this process: {peak_rss_mib():,.0f} MiB")
    if slowest < EVENTS_PER_S_MIN:
        print(f"FAILED: the fabric does {slowest:,.0f} events a second, and must do {EVENTS_PER_S_MIN:,.0f}")
        return 1
    return 0
