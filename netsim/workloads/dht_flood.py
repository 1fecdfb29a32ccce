"""Liars in the DHT: forged, oversized and expired records, by peers whose ids lie as near to a key as many tries can bring them.

An id is bound to its key, so a liar draws keys until one lies near enough; that is what `ids_tried` is. They hold what they forge, so
that whoever asks them is lied to, and offer it to the nodes nearest to the key, again and again. What honest nodes then hold and return is
judged against the signatures and the bounds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import msgpack

from netsim.metrics import Metrics
from netsim.workloads.dht import COMMON_METRICS, DhtScene, Published, peer_of
from netsim.world import HostDied, Machine, World
from overlay.dht import limits
from overlay.dht.records import Record, encode_record, location_of, seal_record
from overlay.dht.table import Contact, node_id_of
from overlay.errors import PeerdError
from overlay.identity import IDENTITY_FILE, PRIVATE_KEY_PREFIX, SEED_BYTES, Identity, verify
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call

DHT = "/peerd/dht/1"
CALL_S = 3.0
STORES_PER_ROUND = 40
FORGED_OF_ONE_S_OWN = 4
"""Under the liar's own name, each new to whoever is offered it: a holder that didn't look at the signature would store them."""


@dataclass(frozen=True, slots=True)
class FloodSettings:
    """Honest hosts publish before and during the flood.

    Attributes:
        key: the one that is attacked; ``keys`` others are used too.
        ids_tried: keys that each liar draws to come near.
        flood_s: how long it lasts, a round of each liar every ``round_s``.
        publishers: honest hosts with a record under the key before, and as many during the flood.
    """

    key: str = "attacked"
    ids_tried: int = 2000
    flood_s: float = 90.0
    round_s: float = 3.0
    publishers: int = 4
    lookers: int = 10
    settle_s: float = 20.0


class Flood(DhtScene[FloodSettings]):
    """See `FloodSettings`. Hosts of the group ``liar`` lie."""

    SETTINGS: ClassVar[type[FloodSettings]] = FloodSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "offered": "records offered by liars",
        "liars.nearest": "liars among the twenty nodes nearest to the key",
        "forged.held": "records with wrong signatures that honest nodes hold, at the end",
        "forged.returned": "records with wrong signatures that lookups returned",
        "held.key.max": "records that an honest node holds under the attacked key",
        "held.publisher.max": "records of one publisher that an honest node holds",
        "held.bytes.max": "bytes of records that an honest node holds",
    }

    COUNTED = ("offered", "forged.held", "forged.returned")

    def __init__(self, world: World, settings: FloodSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._key = settings.key.encode()
        for machine in world.group("liar"):
            self._choose_identity(machine)

    def _choose_identity(self, machine: Machine) -> None:
        """The nearest to the key of many; saved where its peer will look."""
        draws, target = self._world.random("identities"), int.from_bytes(location_of(self._key), "big")
        seeds = [draws.randbytes(SEED_BYTES) for _ in range(self._settings.ids_tried)]
        best = min(seeds, key=lambda seed: int.from_bytes(node_id_of(Identity(seed).peer_id), "big") ^ target)
        machine.disk.write(IDENTITY_FILE, PRIVATE_KEY_PREFIX + best + Identity(best).public_key)

    async def _scene(self) -> None:
        settings, field = self._settings, self._field
        everybody = await self._begin(settings.settle_s)
        field.settled()
        liars = list(self._world.group("liar"))
        honest = [machine for machine in everybody if machine.group != "liar"]
        self._count_nearest()
        before = await self._publish(field.draws.sample(honest, settings.publishers))
        async with asyncio.TaskGroup() as tasks:
            floods = [tasks.create_task(self._lie(machine), name=f"{machine.name} lies") for machine in liars]
            await asyncio.sleep(settings.flood_s / 2)
            during = await self._publish(field.draws.sample(honest, settings.publishers))
            await asyncio.sleep(settings.flood_s / 2)
            await self._look(honest, [*before, *during])
            for flood in floods:
                flood.cancel()
        await self._judge(honest)

    def _count_nearest(self) -> None:
        target = int.from_bytes(location_of(self._key), "big")
        near = sorted(
            self._world.machines.values(),
            key=lambda machine: Contact(peer_of(machine).identity.peer_id).long_id ^ target,
        )
        self._metrics.put("liars.nearest", sum(machine.group == "liar" for machine in near[: limits.KSIZE]))

    async def _publish(self, machines: Sequence[Machine]) -> list[Published]:
        works = [partial(self._field.publish, machine, self._key) for machine in machines]
        return [record for record in await self._field.at_once(works) if record is not None]

    async def _look(self, honest: Sequence[Machine], wanted: Sequence[Published]) -> None:
        lookers = self._field.draws.sample(list(honest), self._settings.lookers)
        await self._field.at_once([partial(self._field.look, machine, wanted) for machine in lookers])
        for machine in lookers:
            try:
                found = await self._world.on(machine, peer_of(machine).find(self._key))
            except HostDied:
                continue
            bad = sum(not _is_genuine(record) for record in found)
            self._metrics.count("forged.returned", bad, of=machine.name if bad else "")
            self._world.trace.note(machine.name, f"found {len(found)} records under the key, {bad} of them forged")

    # --- the liars ---

    async def _lie(self, machine: Machine) -> None:
        while True:
            try:
                await self._world.on(machine, self._round(machine))
            except HostDied:
                return
            await asyncio.sleep(self._settings.round_s)

    async def _round(self, machine: Machine) -> None:
        """Hold forgeries, and offer a mixed lot to a few of the nodes nearest to the key."""
        peer, draws = peer_of(machine), self._field.draws
        lot = self._lot(peer.identity)
        now = self._world.loop.time()
        for record in (found for found in lot if isinstance(found, Record)):
            peer.dht._store.put(record, now)  # as a liar's own code would: unchecked
        raws = [encode_record(found) if isinstance(found, Record) else found for found in lot]
        packed: bytes = msgpack.packb(raws)
        part = Part("records", "uint8", (len(packed),), packed)
        known = [(found, addresses) for found, addresses in peer.dht.known_peers() if addresses]
        target = int.from_bytes(location_of(self._key), "big")
        known.sort(key=lambda entry: Contact(entry[0]).long_id ^ target)
        for other, addresses in draws.sample(known[: limits.KSIZE], min(3, len(known))):
            self._metrics.count("offered", len(raws))
            try:
                message = Message("store", {}, (part,))
                await call(peer.overlay, other, DHT, message, timeout_s=CALL_S, addresses=addresses)
            except PeerdError:
                continue

    def _lot(self, identity: Identity) -> list[Record | bytes]:
        """Forged, oversized, outlived, under another's name, garbage; and genuine ones without number."""
        draws, key = self._field.draws, self._key
        genuine = [
            seal_record(identity, key, draws.randbytes(8), draws.randrange(1, 2**40), 3600, draws.randbytes(900))
            for _ in range(STORES_PER_ROUND // 2)
        ]
        first = genuine[0]
        victim = peer_of(draws.choice(list(self._world.alive("boot")))).identity.peer_id
        lies: list[Record | bytes] = [
            replace(first, value=b"forged"),
            replace(first, publisher=victim),
            replace(first, publisher=victim, subkey=b"s", sequence=2**62),
            replace(first, ttl_s=limits.TTL_S_MAX + 1),
            replace(first, ttl_s=0),
            replace(first, ttl_s=-5),
            replace(first, sequence=2**64 - 1),
            replace(first, value=bytes(limits.VALUE_BYTES_MAX + 1)),
            replace(first, subkey=bytes(limits.SUBKEY_BYTES_MAX + 1)),
            draws.randbytes(200),
            b"",
        ]
        own = [replace(first, subkey=draws.randbytes(8)) for _ in range(FORGED_OF_ONE_S_OWN)]
        return [*own, *lies, *genuine]  # before the genuine ones have used up what a peer may store in a minute

    # --- the judgement ---

    async def _judge(self, honest: Sequence[Machine]) -> None:
        for name in ("held.key.max", "held.publisher.max", "held.bytes.max"):
            self._metrics.put(name, 0)
        for machine in honest:
            dht = peer_of(machine).dht
            held = dht.held(self._key)
            bad = sum(not _is_genuine(record) for record in held)
            self._metrics.count("forged.held", bad, of=machine.name if bad else "")
            self._world.trace.note(machine.name, f"holds {len(held)} records under the key, {bad} of them forged")
            publishers: dict[bytes, int] = {}
            for record in held:
                publishers[record.publisher.multihash] = publishers.get(record.publisher.multihash, 0) + 1
            self._raise("held.key.max", len(held), machine)
            self._raise("held.publisher.max", max(publishers.values(), default=0), machine)
            self._raise("held.bytes.max", dht.statistics().stored_bytes, machine)

    def _raise(self, name: str, value: float, machine: Machine) -> None:
        if value > self._metrics.numbers()[name]:
            self._metrics.put(name, value, of=machine.name)


def _is_genuine(record: Record) -> bool:
    packed: bytes = msgpack.packb(
        [record.key, record.publisher.multihash, record.subkey, record.sequence, record.ttl_s, record.value]
    )
    return verify(record.publisher, record.signature, b"peerd-dht-record:1" + packed)


WORKLOADS = {"flood": Flood}
