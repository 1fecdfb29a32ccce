"""A few hosts, named by their addresses, for tests that build their own: `netsim.fabric` without a world around it.

A host that is killed here goes on running in the test's own task, as a process does that lost its network: nothing it does
reaches anybody.
"""

from __future__ import annotations

import asyncio
import random

from netsim.fabric import Fabric, FabricTransport, Path
from netsim.ports import Disk, SimClock, SimRandomness, SimStorage, SimWallClock
from overlay.ports import Ports


class Lines:
    """A trace that keeps its lines: ``seconds kind host text``."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, kind: str, host: str, text: str) -> None:
        self.lines.append(f"{asyncio.get_running_loop().time():.9f} {kind} {host} {text}")

    def data(self, host: str, source: str, count: int, checksum: int) -> None:
        self.add("data", host, f"{source} {count} {checksum:08x}")


class SmallNetwork:
    """Hosts come to be when they are first named."""

    def __init__(self, trace: Lines, path: Path | None = None) -> None:
        self.trace = trace
        self._fabric = Fabric(trace, random.Random(1), path or Path())
        self._hosts: list[str] = []

    def transport(self, address: str) -> FabricTransport:
        if address not in self._hosts:
            self._hosts.append(address)
            self._fabric.add_host(address, address)
        return self._fabric.transport(address)

    def ports(self, address: str, seed: int = 1) -> Ports:
        """What a host of one seed is given."""
        now = asyncio.get_running_loop().time
        storage = SimStorage(Disk(now))
        randomness = SimRandomness(f"{seed} {address}")
        return Ports(SimClock(now), SimWallClock(now), randomness, (self.transport(address),), storage)

    def set_path(self, source: str, target: str, path: Path) -> None:
        self._fabric.set_path(source, target, path)

    def cut_after(self, source: str, target: str, count: int) -> None:
        """Reset each connection once so many bytes arrived in this direction."""
        self._fabric.cut_after(source, target, count)

    def cut(self, one: str, other: str) -> None:
        """Reset every connection between two hosts, now."""
        self._fabric.reset(one, other)

    def kill(self, address: str) -> None:
        """Its process ends as after kill -9."""
        self._fabric.process_died(address)
