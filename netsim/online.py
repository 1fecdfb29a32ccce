"""Whether a swarm of daemons is there: who is ready, until when a workload waits, how often each block is served over time.

Owns what workloads over whole daemons (`sessions`, `calls`) ask of all of them at once. Must not know what they are then asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from netsim.metrics import Metrics
from netsim.peers.node import NodePeer
from netsim.sim_host import Machine
from netsim.strikes import Striker
from netsim.world import World

LOOK_S = 0.25
SAMPLE_S = 1.0
SEEN_S = 4.0
"""A daemon says that nobody serves some blocks on the word of a look that is up to 3 s old (`peerd.swarm.FRESH_S`)."""


def is_ready(machine: Machine) -> bool:
    """Whether its daemon runs and has met its network."""
    peer = cast(NodePeer | None, machine.peer)
    return machine.is_alive and peer is not None and peer.is_ready.is_set() and peer.status().state == "online"


async def wait_online(world: World, striker: Striker, drivers: str, metrics: Metrics, ready_s: float) -> None:
    """Until every block is served and every driver has met its network; the run fails where that takes longer than ``ready_s``."""
    deadline = world.now_s + ready_s
    while striker.weakest() < 1 or not all(is_ready(machine) for machine in world.group(drivers)):
        if world.now_s > deadline:
            world.fail("", f"not every block was served after {ready_s:g} s")
            return
        await asyncio.sleep(LOOK_S)
    metrics.put("online_s", world.now_s)
    await asyncio.sleep(SEEN_S)


async def sample_coverage(
    world: World, striker: Striker, metrics: Metrics, also: Callable[[], None] = lambda: None
) -> None:
    """Once a second, until cancelled; ``also`` is what else there is to sample."""
    while True:
        coverage = striker.coverage()
        for block, servers in enumerate(coverage):
            metrics.sample(f"coverage.{block}", world.now_s, servers)
        metrics.sample("coverage.min", world.now_s, min(coverage))
        also()
        await asyncio.sleep(SAMPLE_S)
