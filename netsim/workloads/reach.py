"""Who can dial whom behind which NAT: what production does today, and what the boxes would let through.

Groups of `bare` hosts are named after what they sit behind (``open``, ``full-cone``, ...), groups of `raw` ones the same with
``raw-`` in front; ``server`` and ``raw-server`` are open hosts that everybody knows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim import nat
from netsim.metrics import Metrics
from netsim.nat import SITES
from netsim.peers.bare import ECHO, BarePeer
from netsim.peers.raw import RawPeer, address_of
from netsim.sim_host import LISTEN_PORT
from netsim.workloads.streams import one_of, ready
from netsim.world import Machine, World
from overlay.connection import Connection
from overlay.errors import PeerdError
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.stream import Stream

RAW = "raw-"
SERVER = "server"
SETTLE_S = 1.0
"""Until both sides know of a connection, or that it ended."""


@dataclass(frozen=True, slots=True)
class MatrixSettings:
    """``patience_s`` is what a plain dial gets where production doesn't decide."""

    patience_s: float = 6.0


class Matrix:
    """Every kind of site against every other."""

    SETTINGS: ClassVar[type[MatrixSettings]] = MatrixSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "out.*": "by what the dialler sits behind: the share of its dials to an open host that came about",
        "announced.*": "by what the target sits behind: the share of others that reached it by the address that it announces today",
        "public.*": "the same by its public address and listening port",
        "mapped.*": "the same by where a third host saw it come from, after it dialled that one from its listening port",
        "met.*": "the share of others that it met when both dialled from their listening ports to where they had been seen",
        "pairs.now": "the share of all ordered pairs that connect today",
        "pairs.could": "the share of all pairs that could: by any of these ways, either one dialling",
        "dial_s": "seconds of a dial by production that failed",
    }

    def __init__(self, world: World, settings: MatrixSettings, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        self._tries: dict[str, list[bool]] = {}
        self._could: dict[tuple[str, str], bool] = {}

    async def run(self) -> None:
        world = self._world
        await ready(world, list(world.machines.values()))
        sites = [site for site in SITES if world.group(site)]
        await self._production({site: one_of(world, site) for site in sites})
        await self._boxes({site: one_of(world, RAW + site) for site in sites})
        for name, tries in self._tries.items():
            self._metrics.put(name, sum(tries) / len(tries))
        self._metrics.put("pairs.could", sum(self._could.values()) / len(self._could))

    def _note(self, name: str, came_about: bool) -> None:
        self._tries.setdefault(name, []).append(came_about)

    # --- production ---

    async def _production(self, hosts: Mapping[str, Machine]) -> None:
        server = one_of(self._world, SERVER)
        hub = cast(BarePeer, server.peer)
        public: dict[str, Multiaddr] = {}
        for site, machine in hosts.items():
            peer = cast(BarePeer, machine.peer)
            self._note(f"out.{site}", await self._dial(machine, hub, hub.addresses[0]))
            await asyncio.sleep(SETTLE_S)
            met = hub.overlay.connection(peer.peer_id)
            if met is not None and met.remote_address is not None:
                public[site] = tcp_address(str(met.remote_address.host), LISTEN_PORT)
        for source, target in itertools.permutations(hosts, 2):
            other = cast(BarePeer, hosts[target].peer)
            announced = await self._reaches(hosts[source], other, other.addresses[0])
            by_public = await self._reaches(hosts[source], other, public[target])
            self._note(f"announced.{target}", announced)
            self._note(f"public.{target}", by_public)
            self._note("pairs.now", announced)
            self._world.trace.add("reach", hosts[source].name, f"{hosts[target].name} {announced} {by_public}")

    async def _reaches(self, source: Machine, other: BarePeer, address: Multiaddr) -> bool:
        came_about = await self._dial(source, other, address)
        connection = cast(BarePeer, source.peer).overlay.connection(other.peer_id)
        if connection is not None:
            await self._world.on(source, connection.close())
            await asyncio.sleep(SETTLE_S)
        return came_about

    async def _dial(self, source: Machine, other: BarePeer, address: Multiaddr) -> bool:
        peer, began_s = cast(BarePeer, source.peer), self._world.now_s
        try:
            await self._world.on(source, peer.overlay.connect(other.peer_id, (address,)))
        except PeerdError:
            self._metrics.observe("dial_s", self._world.now_s - began_s, of=source.name)
            return False
        return True

    # --- what the boxes let through ---

    async def _boxes(self, hosts: Mapping[str, Machine]) -> None:
        server = one_of(self._world, RAW + SERVER)
        for site, machine in hosts.items():
            seen = await self._reach(machine, server.name, tcp_address(server.address, LISTEN_PORT), True)
            self._note(f"out.{site}", seen)
        for source, target in itertools.combinations(hosts, 2):
            mapped = [
                await self._try_mapped(hosts, *pair, server.name) for pair in ((source, target), (target, source))
            ]
            met = await self._try_meeting(hosts[source], hosts[target], server.name)
            for site in (source, target):
                self._note(f"met.{site}", met)
            self._could[source, target] = met or any(mapped)

    async def _try_mapped(self, hosts: Mapping[str, Machine], source: str, target: str, server: str) -> bool:
        machine, other = hosts[source], hosts[target]
        endpoint = cast(RawPeer, other.peer).seen_as[server]
        mapped = await self._reach(machine, other.name, address_of(endpoint), False)
        self._note(f"mapped.{target}", mapped)
        self._part(machine, other, server)
        return mapped

    async def _try_meeting(self, one: Machine, other: Machine, server: str) -> bool:
        one_seen, other_seen = (cast(RawPeer, machine.peer).seen_as[server] for machine in (one, other))
        there = self._world.loop.create_task(self._reach(other, one.name, address_of(one_seen), True), name="meeting")
        here = await self._reach(one, other.name, address_of(other_seen), True)
        met = await there or here
        await asyncio.sleep(SETTLE_S)
        self._world.trace.add("meet", one.name, f"{other.name} {met}")
        self._part(one, other, server)
        return met

    async def _reach(self, source: Machine, name: str, address: Multiaddr, from_listener: bool) -> bool:
        peer = cast(RawPeer, source.peer)
        reach = peer.reach(name, address, patience_s=self._settings.patience_s, from_listener=from_listener)
        return await self._world.on(source, reach)

    def _part(self, one: Machine, other: Machine, server: str) -> None:
        for machine in (one, other):
            peer, context = cast(RawPeer, machine.peer), self._world.loop.context_of(machine.name)
            self._world.loop.call_soon(peer.close_all, server, context=context)


# --- connections that are quiet, boxes that forget ---


@dataclass(frozen=True, slots=True)
class IdleSettings:
    """Streams through every box are quiet for ``quiet_s``, and used again; then the boxes are switched off and on."""

    quiet_s: float = 10_800.0
    patience_s: float = 120.0


class Idle:
    """Whether a quiet session outlives what its NAT remembers, and when both ends notice that a box forgot it."""

    SETTINGS: ClassVar[type[IdleSettings]] = IdleSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "kept.share": "of the streams that still carried after they were quiet",
        "noticed_s": "seconds after the box was switched off until an end of the connection knew",
        "unnoticed": "ends that never knew",
        "back_s": "seconds from then until there was a new connection",
    }

    def __init__(self, world: World, settings: IdleSettings, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        metrics.count("unnoticed", 0)

    async def run(self) -> None:
        world = self._world
        server = one_of(world, SERVER)
        machines = [one_of(world, site) for site in SITES if world.group(site)]
        hub, *peers = await ready(world, (server, *machines))
        works = [self._one(machine, peer, server, hub) for machine, peer in zip(machines, peers, strict=True)]
        kept = await asyncio.gather(*works)
        self._metrics.put("kept.share", sum(kept) / len(kept))

    async def _one(self, machine: Machine, peer: BarePeer, server: Machine, hub: BarePeer) -> bool:
        world = self._world
        stream = await world.on(machine, peer.open(hub, ECHO))
        before = await world.on(machine, _echoes(stream))
        await asyncio.sleep(self._settings.quiet_s)
        kept = before and await world.on(machine, _echoes(stream))
        ends = (peer.overlay.connection(hub.peer_id), hub.overlay.connection(peer.peer_id))
        world.fabric.reboot_boxes(machine.name)
        began_s = world.now_s
        if machine.group != nat.NatKind.OPEN.value:
            await asyncio.gather(*(self._notice(end, began_s, machine.name) for end in ends if end is not None))
        await world.on(machine, peer.connect(hub))
        self._metrics.observe("back_s", world.now_s - began_s, of=machine.name)
        return kept

    async def _notice(self, end: Connection, began_s: float, name: str) -> None:
        try:
            async with asyncio.timeout(self._settings.patience_s):
                await end.wait_closed()
        except TimeoutError:
            self._metrics.count("unnoticed", of=name)
            return
        self._metrics.observe("noticed_s", self._world.now_s - began_s, of=name)


async def _echoes(stream: Stream) -> bool:
    """Whether what is written comes back."""
    try:
        await stream.write(b"still there?")
        async with asyncio.timeout(10.0):
            return await stream.read_exactly(12) == b"still there?"
    except (PeerdError, TimeoutError):
        return False


WORKLOADS = {"matrix": Matrix, "idle": Idle}
