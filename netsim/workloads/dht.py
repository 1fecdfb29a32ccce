"""The DHT at scale: hosts join, publish, and look for what was published.

Owns `Field`, which the other workloads of the DHT use too: who is there, publishing, looking, and what each costs. A record's value
says who published it, so what is found can be judged. Findings are compared with what was published, never with what another host found.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from netsim.metrics import Metrics
from netsim.peers.dht import DhtPeer
from netsim.workloads import Scene, Told
from netsim.world import HostDied, Machine, World
from overlay.dht.records import Record
from overlay.host import Host
from overlay.identity import PeerId
from overlay.limits import CONNECTIONS_IDLE_MAX

SAMPLE_S = 2.0
TTL_S = 3600.0
AT_ONCE = 20
POLL_S = 0.5

COMMON_METRICS: Mapping[str, str] = {
    "joined": "hosts that joined",
    "join_s": "seconds from start to having found one's neighbours",
    "join.calls": "calls a host made until everybody had joined, on average",
    "contacts": "contacts a host knows when everybody has joined",
    "calls": "calls of all hosts in the whole run",
    "connections": "connections of each host, those that are closing too, sampled once settled",
    "connections.open": "connections of all hosts, over time",
    "connections.quiet_s": "the longest that a connection of a settled host has brought nothing, sampled for each host",
    "connections.over": "samples of a host, from its start, with more connections than the overlay's limit for idle ones",
    "published.holders": "nodes that took a record",
    "publish_s": "seconds until a record was offered to all that should hold it",
    "asked": "lookups",
    "found.share": "of the lookups, those that found all that was to be found",
    "wrong": "records found that nobody published so, or that were withdrawn, or outlived",
    "lookup_s": "seconds a lookup took",
    "lookup.calls": "requests of a lookup",
    "lookup.hops": "length of the chain of answers to the closest node",
    "lookup.silent": "asked nodes that didn't answer in time, a lookup",
}


@dataclass(frozen=True, slots=True)
class Published:
    """A record that has to be found."""

    key: bytes
    subkey: bytes
    value: bytes
    publisher: str


class Field:
    """The hosts of a run, as those who publish and look see them."""

    def __init__(self, world: World, metrics: Metrics, purpose: str) -> None:
        self.world = world
        self.metrics = metrics
        self.draws = world.random(purpose)
        self._asked = 0
        self._found = 0
        self._settled_at = float("inf")
        self._published: dict[bytes, tuple[bytes, PeerId]] = {}
        for name in ("asked", "wrong", "connections.over"):
            metrics.count(name, 0)

    # --- who is there ---

    def joined(self) -> list[Machine]:
        """Those that run and have joined, in a fixed order."""
        return [machine for machine in self.world.alive() if is_joined(machine)]

    async def wait_joined(self, names: Sequence[str] | None = None) -> None:
        """Until every host (or every one of those) runs and has joined; measures it."""
        wanted = [self.world.machines[name] for name in (self.world.machines if names is None else names)]
        while self._count_joined(wanted) < len(wanted):  # noqa: ASYNC110 - virtual time is cheap
            await asyncio.sleep(POLL_S)
        for machine in wanted:
            self.metrics.observe("join_s", peer_of(machine).join_s, of=machine.name)
        calls = sum(peer_of(machine).dht.statistics().calls for machine in wanted)
        self.metrics.put("join.calls", calls / len(wanted))
        for machine in wanted:
            self.metrics.observe("contacts", peer_of(machine).dht.statistics().contacts, of=machine.name)

    def _count_joined(self, wanted: Sequence[Machine]) -> int:
        """A run that ends now tells how many have joined, and who hasn't."""
        missing = [machine.name for machine in wanted if not is_joined(machine)]
        for metric in ("joined", "join_s", "contacts"):
            self.metrics.owed_by(metric, missing)
        joined = len(wanted) - len(missing)
        self.metrics.put("joined", joined)
        return joined

    def settled(self) -> None:
        """From now on it counts how many connections each host has, and how long they were silent."""
        self._settled_at = self.world.now_s

    async def watch(self) -> None:
        """Sample connections, for ever."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            total = 0
            for machine in self.world.alive():
                peer = cast(DhtPeer | None, machine.peer)
                if peer is None:
                    continue
                count = count_connections(self.metrics, machine, peer.overlay)
                total += count
                if self.world.now_s > self._settled_at:
                    self._observe_connections(machine, peer, count)
            self.metrics.sample("connections.open", self.world.now_s, total)

    def _observe_connections(self, machine: Machine, peer: DhtPeer, count: int) -> None:
        self.metrics.observe("connections", count, of=machine.name)
        now = self.world.loop.time()
        quiet_s = max((now - found.last_received for found in peer.overlay.connections()), default=0.0)
        self.metrics.observe("connections.quiet_s", quiet_s, of=machine.name)

    def count_calls(self) -> None:
        """At the end."""
        calls = [peer_of(machine).dht.statistics().calls for machine in self.world.alive() if machine.peer is not None]
        self.metrics.put("calls", sum(calls))

    # --- what they do ---

    def record(self, machine: Machine, key: bytes, ttl_s: float = TTL_S, more: str = "") -> tuple[Published, float]:
        """A record of that host's under ``key``; its value ends with ``more``."""
        value = f"{machine.name} {self.draws.random()!r}{more}".encode()
        self._published[value] = (key, peer_of(machine).identity.peer_id)
        return Published(key, b"s", value, machine.name), ttl_s

    async def publish(self, machine: Machine, key: bytes, ttl_s: float = TTL_S, more: str = "") -> Published | None:
        """Publish a record there; None when the host died meanwhile."""
        record, ttl_s = self.record(machine, key, ttl_s, more)
        began_s = self.world.now_s
        dht = peer_of(machine).dht
        try:
            holders = await self.world.on(machine, dht.publish_and_wait(record.key, record.subkey, record.value, ttl_s))
        except HostDied:
            return None
        self.metrics.observe("publish_s", self.world.now_s - began_s, of=machine.name)
        self.metrics.observe("published.holders", holders, of=machine.name)
        self.world.trace.add("published", machine.name, f"{key.hex()} {holders}")
        return record

    async def look(self, machine: Machine, wanted: Sequence[Published], *, gone: Sequence[bytes] = ()) -> bool:
        """Look for all records of one key; whether all ``wanted`` were found. ``gone`` are values that must not be."""
        peer, began_s, key = peer_of(machine), self.world.now_s, wanted[0].key
        try:
            found = await self.world.on(machine, peer.find(key))
        except HostDied:
            return True  # nobody looked
        values = {record.value: None for record in found}
        missing = [record for record in wanted if record.value not in values]
        wrong = [record for record in found if record.value in gone or not self.is_published(record)]
        self._asked += 1
        self._found += not missing
        self.metrics.count("asked")
        self.metrics.put("found.share", self._found / self._asked, of=machine.name if missing else "")
        self.metrics.count("wrong", len(wrong), of=machine.name if wrong else "")
        self.metrics.observe("lookup_s", self.world.now_s - began_s, of=machine.name)
        if peer.lookup is not None:
            self.metrics.observe("lookup.calls", peer.lookup.requests, of=machine.name)
            self.metrics.observe("lookup.hops", peer.lookup.hops, of=machine.name)
            self.metrics.observe("lookup.silent", peer.lookup.failures, of=machine.name)
        self.world.trace.add("looked", machine.name, f"{key.hex()} {len(found)} missing {len(missing)}")
        return not missing

    def is_published(self, record: Record) -> bool:
        """Whether somebody published it so: this value, under this key, by the peer that it names."""
        return self._published.get(record.value) == (record.key, record.publisher)

    async def at_once(self, works: Sequence[Callable[[], Awaitable[Any]]], count: int = AT_ONCE) -> list[Any]:
        """Do all of it, so many at a time; what came of each, in order."""
        results: list[Any] = [None] * len(works)
        left = iter(enumerate(works))

        async def worker() -> None:
            for index, work in left:
                results[index] = await work()

        async with asyncio.TaskGroup() as tasks:
            for number in range(min(count, len(works))):
                tasks.create_task(worker(), name=f"worker {number}")
        return results


def count_connections(metrics: Metrics, machine: Machine, overlay: Host) -> int:
    """How many it has, those that are closing too; counts it among those with more than are held idle."""
    count = len(overlay.connections()) + len(overlay._draining)
    over = count > CONNECTIONS_IDLE_MAX
    metrics.count("connections.over", int(over), of=machine.name if over else "")
    return count


def peer_of(machine: Machine) -> DhtPeer:
    """The peer that runs there. Only of one that runs."""
    peer = machine.peer
    assert isinstance(peer, DhtPeer)
    return peer


def is_joined(machine: Machine) -> bool:
    """Whether a peer runs there and has joined."""
    return machine.peer is not None and cast(DhtPeer, machine.peer).joined.is_set()


class DhtScene(Scene[Told], ABC):
    """A scene on a field of its own, with the watch beside it."""

    def __init__(self, world: World, settings: Told, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._field = Field(world, metrics, type(self).__name__.lower())

    async def run(self) -> None:
        """The scene, and what is counted at its end."""
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._field.watch(), name="watch")
            await self._scene()
            self._field.count_calls()
            watch.cancel()

    @abstractmethod
    async def _scene(self) -> None:
        """What happens."""

    async def _begin(self, settle_s: float) -> list[Machine]:
        """Everybody, once all have joined and a while has passed."""
        await self._field.wait_joined()
        await asyncio.sleep(settle_s)
        return self._field.joined()


@dataclass(frozen=True, slots=True)
class RecordsSettings:
    """Everybody joins, some publish, some look.

    Attributes:
        records: keys with one record each, published by hosts drawn by the seed.
        finders: hosts drawn for each key, that look for it.
        shared_keys: keys under which ``sharers`` hosts each publish a record, and that every host looks for.
        settle_s: between the last join and the first record.
        calm_s: between the records and the looking.
        lost_group: hosts that are cut from the power before the looking; ``lost_share`` of them.
        lookers_max: of those that look for the shared keys, no more than this; all where it is 0.
        ttl_s: of each record.
    """

    records: int = 100
    finders: int = 20
    shared_keys: int = 4
    sharers: int = 8
    settle_s: float = 30.0
    calm_s: float = 10.0
    lost_group: str = ""
    lost_share: float = 0.0
    lookers_max: int = 0
    ttl_s: float = TTL_S


class Records(DhtScene[RecordsSettings]):
    """See `RecordsSettings`."""

    SETTINGS: ClassVar[type[RecordsSettings]] = RecordsSettings
    METRICS: ClassVar[Mapping[str, str]] = {**COMMON_METRICS, "shared.records": "records that everybody looked for"}

    async def _scene(self) -> None:
        field, settings = self._field, self._settings
        await self._begin(settings.settle_s)
        field.settled()
        lost = self._to_be_lost()
        stay = [machine for machine in field.joined() if machine.name not in lost]
        keys = [f"key {number}".encode() for number in range(settings.records)]
        publishing = [(field.draws.choice(stay), key) for key in keys]
        for number in range(settings.shared_keys):
            publishing += [
                (machine, f"shared {number}".encode()) for machine in field.draws.sample(stay, settings.sharers)
            ]
        made = await field.at_once(
            [partial(field.publish, machine, key, settings.ttl_s) for machine, key in publishing]
        )
        await asyncio.sleep(settings.calm_s)
        for name in lost:
            self._world.power_off(self._world.machines[name])
        await self._look([record for record in made if record is not None], stay)

    def _to_be_lost(self) -> dict[str, None]:
        group = self._world.group(self._settings.lost_group)
        count = round(self._settings.lost_share * len(group))
        return {machine.name: None for machine in self._field.draws.sample(list(group), count)}

    async def _look(self, made: Sequence[Published], stay: Sequence[Machine]) -> None:
        field, settings = self._field, self._settings
        single = [record for record in made if record.key.startswith(b"key")]
        works = [
            (machine, [record])
            for record in single
            for machine in field.draws.sample(stay, min(settings.finders, len(stay)))
        ]
        field.draws.shuffle(works)
        shared: dict[bytes, list[Published]] = {}
        for record in made:
            if record.key.startswith(b"shared"):
                shared.setdefault(record.key, []).append(record)
        lookers = list(stay)
        if settings.lookers_max:
            lookers = field.draws.sample(lookers, min(settings.lookers_max, len(lookers)))
        works += [(machine, records) for machine in lookers for records in shared.values()]
        self._metrics.put("shared.records", sum(map(len, shared.values())))
        await field.at_once([partial(field.look, machine, wanted) for machine, wanted in works])


WORKLOADS = {"records": Records}
