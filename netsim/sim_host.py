"""A simulated machine, and what one run of the software on it is given.

Owns the states of a machine (the table of who may follow whom) and the ports of its current incarnation. `netsim.world`
changes them; peers read.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - a seeded generator, never the global one
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsim.fabric import FabricTransport
from netsim.ports import Condition, Disk, SimClock, SimRandomness, SimStorage, SimWallClock
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.ports import Ports

if TYPE_CHECKING:
    from netsim.peers import Peer
    from netsim.world import World

LISTEN_PORT = 4001
"""Where peers listen, so that everybody can be told of everybody."""


class State(Enum):
    """What a machine is doing."""

    IDLE = "idle"
    """Powered, and nothing of ours runs: never started, ended, or killed."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to stop, and still at it."""
    FROZEN = "frozen"
    """SIGSTOP: the process stands still, the kernel goes on."""
    ASLEEP = "asleep"
    """A closed lid: nothing of the machine goes on."""
    DARK = "dark"
    """Without power."""


@dataclass(frozen=True, slots=True)
class SimHost:
    """One incarnation, as the peer in it sees the world."""

    name: str
    address: str
    group: str
    incarnation: int
    ports: Ports
    storage: SimStorage
    transport: FabricTransport
    condition: Condition
    world: World
    over: asyncio.Future[None]
    """Done when this incarnation is over."""

    @property
    def directory(self) -> Path:
        """For real files of this host: another after each loss of its state. It isn't made here."""
        return self.world.directory / f"{self.name}-{self.world.machines[self.name].disk.number}"

    @property
    def listen_address(self) -> Multiaddr:
        return tcp_address(self.address, LISTEN_PORT)

    def random(self, purpose: str) -> random.Random:
        """A generator of this incarnation's own for one purpose."""
        return self.world.random(f"{self.name}#{self.incarnation} {purpose}")

    def trace(self, kind: str, text: str, session: str = "") -> None:
        """An event of this host; of a dead incarnation's, nothing is heard."""
        if not self.over.done():
            self.world.trace.add(kind, self.name, text, session)


@dataclass(slots=True, eq=False)
class Machine:
    """What lasts: a name, an address, a disk, a clock, and whatever runs on it now."""

    name: str
    address: str
    group: str
    kind: str
    settings: Any
    disk: Disk
    wall_clock: SimWallClock
    condition: Condition = field(default_factory=Condition)
    state: State = State.IDLE
    incarnation: int = 0
    host: SimHost | None = None
    peer: Peer | None = None
    """What runs now; None before it was made and after it ended."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing of ours runs here."""

    @property
    def is_alive(self) -> bool:
        """Whether a process is there: running, stopping, frozen or asleep."""
        return self.state in (State.RUNNING, State.STOPPING, State.FROZEN, State.ASLEEP)

    @property
    def is_stopping(self) -> bool:
        return self.state is State.STOPPING

    def boot(self, world: World, clock: Callable[[], float], transport: FabricTransport) -> SimHost:
        """The next incarnation's view of the world."""
        self.incarnation += 1
        storage = SimStorage(self.disk)
        seed = f"{world.seed} {self.name}#{self.incarnation} ports"
        ports = Ports(SimClock(clock), self.wall_clock, SimRandomness(seed), (transport,), storage)
        over = world.loop.create_future()
        self.host = host = SimHost(
            self.name,
            self.address,
            self.group,
            self.incarnation,
            ports,
            storage,
            transport,
            self.condition,
            world,
            over,
        )
        return host
