"""How fast the simulator is: fabric events with sinks in place of nodes, and calls through the whole overlay. `python -m netsim bench`.

A figure is per second of one core's own time, so that a crowded machine tells the same; the best of some runs is told.
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
from netsim.sink_bench import MBIT, measure_events, measure_memory
from netsim.trace import Trace
from netsim.world import World, generator

EVENTS_PER_S_MIN = 50_000.0
"""What the fabric must do with a sink in place of nodes."""
CALLS = 2_000
CALLS_AT_ONCE = 16
CALL_BYTES = 200
BEST_OF = 3
CARDS = (
    ("fabric, idle cards", Card()),
    ("fabric, cards of 1 Gbit/s", Card(1000 * MBIT, 1000 * MBIT)),
    ("fabric, uplinks of 20 Mbit/s", Card(20 * MBIT, 100 * MBIT)),
)


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


def main() -> int:
    """Print the figures; 1 when the fabric is slower than it must be."""
    rows = [("what", "a second of one core", "")]
    slowest = float("inf")
    for label, card in CARDS:
        figures = max((measure_events(card=card) for _ in range(BEST_OF)), key=lambda one: one.events_per_s)
        slowest = min(slowest, figures.events_per_s)
        sent = f"{figures.events:,} events, {figures.connections} connections, {figures.delivered_bytes / 1e6:,.0f} MB"
        rows.append((label, f"{figures.events_per_s:,.0f} events", sent))
    for label, is_noise in (("signed calls, Noise", True), ("signed calls, null channel", False)):
        rate = max(measure_calls(is_noise=is_noise) for _ in range(BEST_OF))
        rows.append((label, f"{rate:,.0f} calls", f"{CALLS_AT_ONCE} at once over one connection, both ends counted"))
    print("\n".join(table(rows, right=(1,), indent="")))
    print(f"one end of an idle connection: {measure_memory():,.0f} bytes of the fabric's own")
    if slowest < EVENTS_PER_S_MIN:
        print(f"FAILED: the fabric does {slowest:,.0f} events a second, and must do {EVENTS_PER_S_MIN:,.0f}")
        return 1
    return 0
