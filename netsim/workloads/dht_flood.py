"""Liars in the DHT: forged, oversized and expired records, by peers whose ids lie as near to a key as many tries can bring them.

An id is bound to its key, so a liar draws keys until one lies near enough; that is what `ids_tried` is. They hold what they make up, so
that whoever asks them is lied to, and offer it to the nodes nearest to the key, again and again:

- records with wrong signatures,
- records over a limit, each signed well by the liar's own key, so that nothing but the limit is against it,
- records of others that were published well and are over: of a publisher that died, and of one that took them back. A liar brings these
  and doesn't tell them when asked: of a record that is told, nobody but its publisher knows how old it is,
- good records of their own without number. One liar holds more than a node takes of one publisher, under several keys, and the others
  name these, so that nodes fetch them.

What honest nodes then hold and return is judged against the signatures and the bounds, by this file's own reading of both.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import msgpack

from netsim.metrics import Metrics
from netsim.workloads.dht import COMMON_METRICS, DhtScene, Published, peer_of
from netsim.world import HostDied, Machine, World
from overlay.dht import limits
from overlay.dht.pages import Entry
from overlay.dht.records import DOMAIN, Record, encode_record, location_of
from overlay.dht.store import Put, RecordStore
from overlay.dht.table import Contact, node_id_of
from overlay.errors import PeerdError
from overlay.identity import IDENTITY_FILE, PRIVATE_KEY_PREFIX, SEED_BYTES, Identity, PeerId, verify
from overlay.multiaddr import Multiaddr
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call

DHT = "/peerd/dht/1"
CALL_S = 3.0
GENUINE_PER_ROUND = 20
OUTLIVED_PER_ROUND = 4
OUTLIVED_SLACK_S = 5.0
VALUE_BYTES = 900
FORGED_OF_ONE_S_OWN = 4
"""Under the liar's own name, each new to whoever is offered it: a holder that didn't look at the signature would store them."""


@dataclass(frozen=True, slots=True)
class FloodSettings:
    """Honest hosts publish before and during the flood.

    Attributes:
        key: the one that is attacked.
        keys: others, under which records are outlived, and of one liar there are ``hoard`` each.
        outlived_ttl_s: of the records that are over when they are brought.
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
    keys: int = 6
    hoard: int = 200
    outlived_ttl_s: float = 30.0
    settle_s: float = 20.0


class LiarsStore(RecordStore):
    """A store that tells, beside what it was offered, what a liar put there: nothing bounds that."""

    def __init__(self) -> None:
        super().__init__()
        self.lies: dict[bytes, Sequence[Record]] = {}

    def newer(self, key: bytes, serial: int, now: float) -> list[Entry]:
        lies = [Entry(record, 0, float(record.ttl_s)) for record in self.lies.get(key, ())]
        return [*lies, *super().newer(key, serial, now)]


class Flood(DhtScene[FloodSettings]):
    """See `FloodSettings`. Hosts of the group ``liar`` lie."""

    SETTINGS: ClassVar[type[FloodSettings]] = FloodSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "offered": "records offered by liars",
        "liars.nearest": "liars among the twenty nodes nearest to the key",
        "forged.held": "records with wrong signatures that honest nodes hold, at the end",
        "forged.returned": "records with wrong signatures that lookups returned",
        "over.limits": "records over a limit that honest nodes hold, at the end, or that lookups returned",
        "over.refused": "well signed records over a limit that the node they were offered to called invalid",
        "outlived.held": "records whose time was over before they were brought that honest nodes hold, at the end",
        "outlived.returned": "such records that lookups returned",
        "outlived.brought": "such records that were offered and looked at",
        "held.key.max": "records that an honest node holds under a key",
        "held.share.max": "records of one publisher that an honest node holds under a key",
        "held.publisher.max": "records of one publisher that an honest node holds",
        "held.bytes.max": "bytes of records that an honest node holds",
    }

    COUNTED = (
        "offered", "forged.held", "forged.returned", "over.limits", "over.refused",
        "outlived.held", "outlived.returned", "outlived.brought",
    )  # fmt: skip

    def __init__(self, world: World, settings: FloodSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._key = settings.key.encode()
        self._keys = [f"beside {number}".encode() for number in range(settings.keys)]
        self._outlived: dict[bytes, Record] = {}
        """By signature."""
        self._hoard: list[Record] = []
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
        await self._outlive(honest)
        honest = [machine for machine in honest if machine.is_alive]
        self._fill_hoard(liars[0])
        publishers = field.draws.sample(honest, 2 * settings.publishers)
        before = await self._publish(publishers[: settings.publishers])
        async with asyncio.TaskGroup() as tasks:
            floods = [tasks.create_task(self._lie(machine), name=f"{machine.name} lies") for machine in liars]
            await asyncio.sleep(settings.flood_s / 2)
            during = await self._publish(publishers[settings.publishers :])
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

    async def _outlive(self, honest: Sequence[Machine]) -> None:
        """Records of two hosts run out: one dies, the other takes them back. The liars have kept them."""
        ttl_s = self._settings.outlived_ttl_s
        dying, withdrawing = self._field.draws.sample([machine for machine in honest if machine.group != "boot"], 2)
        for machine in (dying, withdrawing):
            for key in self._keys:
                await self._field.publish(machine, key, ttl_s)
                for record in peer_of(machine).dht._publications.records_of(key):
                    self._outlived[record.signature] = record
        for key in self._keys:
            await self._world.on(withdrawing, peer_of(withdrawing).dht.withdraw(key, b"s"))
        self._world.kill(dying)
        await asyncio.sleep(ttl_s + OUTLIVED_SLACK_S)

    def _fill_hoard(self, machine: Machine) -> None:
        """More than a node takes of one publisher."""
        lies = _liars_store(machine).lies
        for key in self._keys:
            numbers = range(self._settings.hoard)
            lies[key] = [
                _sign(peer_of(machine).identity, key, number.to_bytes(2, "big"), 1, 3600, b"x") for number in numbers
            ]
            self._hoard.append(lies[key][0])

    async def _look(self, honest: Sequence[Machine], wanted: Sequence[Published]) -> None:
        lookers = self._field.draws.sample(list(honest), self._settings.lookers)
        await self._field.at_once([partial(self._field.look, machine, wanted) for machine in lookers])
        for machine in lookers:
            await self._find(machine, self._key)
        for key in self._keys:
            await self._find(self._field.draws.choice(honest), key)

    async def _find(self, machine: Machine, key: bytes) -> None:
        """What a lookup returns is judged."""
        try:
            found = await self._world.on(machine, peer_of(machine).find(key))
        except HostDied:
            return
        bad = sum(not _is_genuine(record) for record in found)
        over = sum(map(_is_over, found))
        old = sum(record.signature in self._outlived for record in found)
        for name, count in (("forged.returned", bad), ("over.limits", over), ("outlived.returned", old)):
            self._metrics.count(name, count, of=machine.name if count else "")
        told = f"{len(found)} records under {key.hex()}, {bad} of them forged, {over} over a limit, {old} outlived"
        self._world.trace.note(machine.name, f"found {told}")

    # --- the liars ---

    async def _lie(self, machine: Machine) -> None:
        while True:
            try:
                await self._world.on(machine, self._round(machine))
            except HostDied:
                return
            await asyncio.sleep(self._settings.round_s)

    async def _round(self, machine: Machine) -> None:
        """Hold lies, and offer a mixed lot to a few of the nodes nearest to the key."""
        peer, draws, store = peer_of(machine), self._field.draws, _liars_store(machine)
        over, forged, genuine = (
            self._over_limits(peer.identity),
            self._forged(peer.identity),
            self._genuine(peer.identity),
        )
        store.lies[self._key] = [record for record in (*over, *forged) if record.key == self._key]
        for record in genuine:
            store.put(record, self._world.loop.time())
        old = draws.sample(list(self._outlived.values()), min(OUTLIVED_PER_ROUND, len(self._outlived)))
        hoard = [record for record in self._hoard if record.publisher != peer.identity.peer_id]
        # the genuine ones last: before they have used up what a peer may store in a minute
        lot = [
            *map(encode_record, (*over, *old, *hoard, *forged)),
            draws.randbytes(200),
            b"",
            *map(encode_record, genuine),
        ]
        known = [(found, addresses) for found, addresses in peer.dht.known_peers() if addresses]
        target = int.from_bytes(location_of(self._key), "big")
        known.sort(key=lambda entry: Contact(entry[0]).long_id ^ target)
        for other, addresses in draws.sample(known[: limits.KSIZE], min(3, len(known))):
            self._metrics.count("offered", len(lot))
            outcomes = await _offer(machine, other, addresses, lot)
            self._metrics.count("over.refused", outcomes[: len(over)].count(Put.INVALID.value))
            brought = outcomes[len(over) : len(over) + len(old)]
            self._metrics.count("outlived.brought", sum(found != Put.RATE.value for found in brought))

    def _genuine(self, identity: Identity) -> list[Record]:
        draws = self._field.draws
        return [
            _sign(
                identity, self._key, draws.randbytes(8), draws.randrange(1, 2**40), 3600, draws.randbytes(VALUE_BYTES)
            )
            for _ in range(GENUINE_PER_ROUND)
        ]

    def _forged(self, identity: Identity) -> list[Record]:
        """Wrong signatures, under the liar's own name and another's."""
        draws = self._field.draws
        good = _sign(identity, self._key, draws.randbytes(8), 1, 3600, b"good")
        victim = peer_of(draws.choice(list(self._world.alive("boot")))).identity.peer_id
        lies = [
            replace(good, value=b"forged"),
            replace(good, publisher=victim),
            replace(good, publisher=victim, subkey=b"s", sequence=limits.SEQUENCE_MAX),
        ]
        return [*lies, *(replace(good, subkey=draws.randbytes(8)) for _ in range(FORGED_OF_ONE_S_OWN))]

    def _over_limits(self, identity: Identity) -> list[Record]:
        """One over each limit, and signed; each under a name of its own, so that nothing else stands in its way."""
        draws = self._field.draws

        def sign(
            key: bytes = self._key, more: bytes = b"", sequence: int = 1, ttl_s: int = 3600, value: bytes = b"over"
        ) -> Record:
            return _sign(identity, key, draws.randbytes(8) + more, sequence, ttl_s, value)

        return [
            sign(ttl_s=limits.TTL_S_MAX + 1),
            sign(ttl_s=0),
            sign(ttl_s=-5),
            sign(sequence=-1),
            sign(sequence=limits.SEQUENCE_MAX + 1),
            sign(value=bytes(limits.VALUE_BYTES_MAX + 1)),
            sign(more=bytes(limits.SUBKEY_BYTES_MAX)),
            sign(key=b""),
            sign(key=draws.randbytes(limits.KEY_BYTES_MAX + 1)),
        ]

    # --- the judgement ---

    async def _judge(self, honest: Sequence[Machine]) -> None:
        for name in ("held.key.max", "held.share.max", "held.publisher.max", "held.bytes.max"):
            self._metrics.put(name, 0)
        forged: dict[Record, bool] = {}
        for machine in honest:
            dht = peer_of(machine).dht
            held = {key: dht.held(key) for key in list(dht._store._keys)}
            records = [record for found in held.values() for record in found]
            for record in records:
                if record not in forged:
                    forged[record] = not _is_genuine(record)
            bad = sum(forged[record] for record in records)
            over = sum(map(_is_over, records))
            old = sum(record.signature in self._outlived for record in records)
            for name, count in (("forged.held", bad), ("over.limits", over), ("outlived.held", old)):
                self._metrics.count(name, count, of=machine.name if count else "")
            told = f"{len(records)} records, {bad} of them forged, {over} over a limit, {old} outlived"
            self._world.trace.note(machine.name, f"holds {told}")
            publishers = Counter(record.publisher.multihash for record in records)
            shares = Counter((record.key, record.publisher.multihash) for record in records)
            self._raise("held.share.max", max(shares.values(), default=0), machine)
            self._raise("held.key.max", max(map(len, held.values()), default=0), machine)
            self._raise("held.publisher.max", max(publishers.values(), default=0), machine)
            self._raise("held.bytes.max", dht.statistics().stored_bytes, machine)

    def _raise(self, name: str, value: float, machine: Machine) -> None:
        if value > self._metrics.numbers()[name]:
            self._metrics.put(name, value, of=machine.name)


def _liars_store(machine: Machine) -> LiarsStore:
    dht = peer_of(machine).dht
    if not isinstance(dht._store, LiarsStore):
        dht._store = LiarsStore()
    return dht._store


async def _offer(machine: Machine, other: PeerId, addresses: Sequence[Multiaddr], lot: Sequence[bytes]) -> list[str]:
    """What the other says to each; nothing when it doesn't answer."""
    packed: bytes = msgpack.packb(list(lot))
    message = Message("store", {}, (Part("records", "uint8", (len(packed),), packed),))
    try:
        answer = await call(peer_of(machine).overlay, other, DHT, message, timeout_s=CALL_S, addresses=addresses)
    except PeerdError:
        return []
    return [outcome for outcome, _ in answer.header["outcomes"]]


def _signed_bytes(key: bytes, publisher: PeerId, subkey: bytes, sequence: int, ttl_s: int, value: bytes) -> bytes:
    packed: bytes = msgpack.packb([key, publisher.multihash, subkey, sequence, ttl_s, value])
    return DOMAIN + packed


def _sign(identity: Identity, key: bytes, subkey: bytes, sequence: int, ttl_s: int, value: bytes) -> Record:
    """As `seal_record`, whatever the limits are."""
    signature = identity.sign(_signed_bytes(key, identity.peer_id, subkey, sequence, ttl_s, value))
    return Record(key, identity.peer_id, subkey, sequence, ttl_s, value, signature)


def _is_genuine(record: Record) -> bool:
    signed = _signed_bytes(record.key, record.publisher, record.subkey, record.sequence, record.ttl_s, record.value)
    return verify(record.publisher, record.signature, signed)


def _is_over(record: Record) -> bool:
    """Whether it is over a limit."""
    return not (
        1 <= len(record.key) <= limits.KEY_BYTES_MAX
        and len(record.subkey) <= limits.SUBKEY_BYTES_MAX
        and len(record.value) <= limits.VALUE_BYTES_MAX
        and 1 <= record.ttl_s <= limits.TTL_S_MAX
        and 0 <= record.sequence <= limits.SEQUENCE_MAX
    )


WORKLOADS = {"flood": Flood}
