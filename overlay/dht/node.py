"""The DHT on a host: answers, asks, publishes and keeps alive what it published.

Owns `/peerd/dht/1`, the table's contents and the store. Contacts are admitted after an authenticated handshake, when their
identify list says that they serve the DHT and they answered. A record is taken only from its publisher's own connection, or after
its publisher was dialled. The pure parts are `records`, `store`, `table`; lookups are `lookup`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from overlay.connection import Connection
from overlay.dht import limits
from overlay.dht.lookup import Found, NodeLookup, ValueLookup
from overlay.dht.records import Record, decode_record, encode_record, merge_records, seal_record
from overlay.dht.store import Outcome, RecordStore
from overlay.dht.table import Contact, Table, Target, address_group, node_id_of
from overlay.errors import InvalidAddress, LimitExceeded, PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports
from overlay.rpc.types import Message
from overlay.rpc.unary import call, serve_unary

log = logging.getLogger(__name__)

DHT_PROTOCOL = "/peerd/dht/1"
RETRY_BOOTSTRAP_S = 5.0


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """``server`` False: this node can't be dialled, so it asks and never answers."""

    server: bool = True
    ksize: int = limits.KSIZE


@dataclass(slots=True)
class _Publication:
    """Something that this node keeps alive."""

    key: bytes
    subkey: bytes
    value: bytes
    ttl_s: float
    sequence: int
    due: float = 0.0
    stored_at: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class DhtStatistics:
    """A snapshot."""

    contacts: int
    records: int
    store_bytes: int
    publications: int
    calls: int
    refused: int


class Dht:
    """``async with Dht(host, ports, config) as dht``."""

    def __init__(self, host: Host, ports: Ports, config: DhtConfig | None = None) -> None:
        self._host = host
        self._ports = ports
        self.config = config or DhtConfig()
        self._own = Target(node_id_of(host.peer_id))
        self._table = Table(self._own, self.config.ksize)
        self._store = RecordStore()
        self._publications: dict[tuple[bytes, bytes], _Publication] = {}
        self._sequence = 0
        self._queried: dict[int, float] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._background: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._first_contact = asyncio.Event()
        self._calls = 0
        self._refused = 0
        self._pinging: set[bytes] = set()

    # --- life ---

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._sequence = int(self._ports.wall_clock.now_s() * 1000)
        if self.config.server:
            methods = {"find-node": self._answer_find_node, "find-value": self._answer_find_value,
                       "store": self._answer_store, "ping": self._answer_ping}  # fmt: skip
            serve_unary(self._host, DHT_PROTOCOL, methods, message_bytes_max=limits.ANSWER_BYTES_MAX)
        self._host.add_connection_listener(self._connected, self._disconnected)
        for work, name in ((self._keep_publishing(), "dht publisher"), (self._refresh(), "dht refresh")):
            self._background.append(self._tasks.create_task(work, name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.config.server:
            self._host.unserve(DHT_PROTOCOL)
        for task in self._background:
            task.cancel()
        assert self._tasks is not None
        await self._tasks.__aexit__(None, None, None)

    @property
    def is_ready(self) -> bool:
        """Whether anybody else is known."""
        return bool(self._table.contacts())

    def statistics(self) -> DhtStatistics:
        contacts = len(self._table.contacts())
        return DhtStatistics(
            contacts, len(self._store), self._store.size_bytes, len(self._publications), self._calls, self._refused
        )

    def known_peers(self) -> list[tuple[PeerId, tuple[Multiaddr, ...]]]:
        """Contacts and their addresses, to meet again after a restart."""
        return [(contact.peer, contact.addresses) for contact in self._table.contacts()]

    # --- joining ---

    async def bootstrap(self, peers: Sequence[Multiaddr]) -> int:
        """Meet ``peers`` (multiaddrs, with or without /p2p), then look for ourselves. Returns how many answered.

        May be called again. Never raises for a peer that can't be reached.
        """
        reached = await asyncio.gather(*(self._meet(address) for address in peers))
        count = sum(reached)
        if count:
            await self.lookup(self._own.id)
            self._wake.set()
        return count

    async def _meet(self, address: Multiaddr) -> bool:
        named = address.get("p2p")
        try:
            peer = PeerId.from_text(named) if named else None
            connection = await self._host.connect(peer, (address,))
            contact = Contact(connection.remote_peer, self._addresses_of(connection))
            return await self._ask(contact, "ping", {}) is not None
        except PeerdError as error:
            log.debug("%s can't be met: %s", address, error)
            return False

    def _addresses_of(self, connection: Connection) -> tuple[Multiaddr, ...]:
        known = self._host.address_book.addresses(connection.remote_peer, self._ports.clock.now())
        if connection.remote_address is not None and not connection.is_inbound:
            known = (connection.remote_address, *(address for address in known if address != connection.remote_address))
        return known[: limits.CONTACT_ADDRESSES_MAX]

    def _connected(self, connection: Connection) -> None:
        """A new peer: once identify has told that it serves the DHT, it's asked, and admitted if it answers."""
        assert self._tasks is not None
        self._background = [task for task in self._background if not task.done()]
        self._background.append(
            self._tasks.create_task(self._try_contact(connection), name=f"dht greets {connection.remote_peer.short}")
        )

    def _disconnected(self, connection: Connection) -> None:
        """Contacts need no connection; the next question finds out."""

    async def _try_contact(self, connection: Connection) -> None:
        peer = connection.remote_peer
        for _ in range(20):
            if DHT_PROTOCOL in self._host.protocols_of(peer):
                break
            await asyncio.sleep(0.05)
        else:
            return
        if self._table.find(peer) is None and connection.is_open:
            await self._ask(Contact(peer, self._addresses_of(connection)), "ping", {})

    # --- lookups ---

    async def lookup(self, target: bytes) -> list[Contact]:
        """The closest live contacts to a point of the key space."""
        point = Target(target)
        self._queried[self._table.get_bucket_for(point)] = self._ports.clock.now()
        start = self._table.find_neighbors(point)
        return await NodeLookup(self, point, start, self._own.id, self.config.ksize).find()

    async def find_peer(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Addresses of a peer: known ones, else what its neighbours say."""
        known = self._host.address_book.addresses(peer, self._ports.clock.now())
        if known:
            return known
        target = node_id_of(peer)
        lookup = NodeLookup(
            self, Target(target), self._table.find_neighbors(Target(target)), self._own.id, self.config.ksize
        )
        await lookup.find()
        for found in lookup.answered.values():
            for contact in found.contacts:
                if contact.peer == peer:
                    return contact.addresses
        return ()

    async def get(self, key: bytes) -> tuple[Record, ...]:
        """Every live record of a key: merged over the network, this node's store and its own publications."""
        point = Target(key)
        start = self._table.find_neighbors(point)
        lookup = ValueLookup(self, point, start, self._own.id, self.config.ksize)
        await lookup.find()
        now = self._ports.clock.now()
        own = [self._sealed(found) for found in self._publications.values() if found.key == key]
        merged = merge_records([*lookup.records(), *self._store.get(key, now), *own])
        return tuple(record for record in merged if not record.is_withdrawal)

    # --- publishing ---

    def publish(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> None:
        """Keep ``value`` alive under (key, subkey): stored now and at half-life, and again when the neighbourhood changes.

        Raises LimitExceeded, or ValueError for a value out of bounds: our own mistake.
        """
        self._set(key, subkey, value, ttl_s)
        self._wake.set()

    async def publish_and_wait(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> int:
        """As `publish`, and wait for the first stores. Returns how many others hold it."""
        publication = self._set(key, subkey, value, ttl_s)
        await self._distribute(publication)
        return len(publication.stored_at)

    async def withdraw(self, key: bytes, subkey: bytes) -> None:
        """Replace what was published by a withdrawal, at once, and stop keeping it alive."""
        known = self._publications.get((key, subkey))
        if known is None:
            return
        publication = self._set(key, subkey, b"", known.ttl_s)
        await self._distribute(publication)
        if self._publications.get((key, subkey)) is publication:
            del self._publications[key, subkey]

    def _set(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> _Publication:
        if len(self._publications) >= limits.PUBLICATIONS_MAX and (key, subkey) not in self._publications:
            raise LimitExceeded("This node publishes too much; serve fewer models.")
        self._sequence = max(self._sequence + 1, int(self._ports.wall_clock.now_s() * 1000))
        publication = _Publication(key, subkey, value, ttl_s, self._sequence)
        seal_record(self._host.identity, key, subkey, publication.sequence, ttl_s, value)
        self._publications[key, subkey] = publication
        return publication

    def _sealed(self, found: _Publication) -> Record:
        return seal_record(self._host.identity, found.key, found.subkey, found.sequence, found.ttl_s, found.value)

    async def _distribute(self, publication: _Publication) -> None:
        now = self._ports.clock.now()
        publication.due = now + publication.ttl_s / 2
        record = self._sealed(publication)
        closest = await self.lookup(publication.key)
        outcomes = await asyncio.gather(*(self._store_at(contact, [record]) for contact in closest))
        publication.stored_at = frozenset(
            contact.peer for contact, stored in zip(closest, outcomes, strict=True) if stored
        )
        if not publication.stored_at:
            publication.due = now + limits.REPUBLISH_RETRY_S

    async def _store_at(self, contact: Contact, records: list[Record]) -> bool:
        fields = {"records": [encode_record(record) for record in records]}
        return await self._ask(contact, "store", fields) is not None

    async def _keep_publishing(self) -> None:
        """Store what is due; wakes early when something was published or the neighbourhood changed."""
        while True:
            now = self._ports.clock.now()
            self._store.expire(now)
            for publication in list(self._publications.values()):
                if publication.due <= now or self._neighbours_changed(publication):
                    await self._distribute(publication)
            self._wake.clear()
            if any(found.due <= self._ports.clock.now() for found in self._publications.values()):
                continue
            try:
                async with asyncio.timeout(limits.EXPIRY_TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _neighbours_changed(self, publication: _Publication) -> bool:
        closest = self._table.find_neighbors(Target(publication.key), self.config.ksize)
        return any(contact.peer not in publication.stored_at and contact.failures == 0 for contact in closest)

    async def _refresh(self) -> None:
        """Look for ourselves now and then, and into buckets that nobody here has asked about."""
        while True:
            await asyncio.sleep(limits.REFRESH_S)
            await self.lookup(self._own.id)
            now = self._ports.clock.now()
            for index in self._table.stale_targets(self._queried, now, 3 * limits.REFRESH_S):
                low, high = self._table.buckets[index].range if index < len(self._table.buckets) else (0, 0)
                target = low + self._ports.randomness.below(max(1, high - low))
                await self.lookup(target.to_bytes(32, "big"))

    # --- asking ---

    async def find_node(self, contact: Contact, target: bytes) -> Found | None:
        """For lookups; None when there was no usable answer."""
        answer = await self._ask(contact, "find-node", {"target": target})
        return None if answer is None else Found(self._read_contacts(answer.header.get("contacts")))

    async def find_value(self, contact: Contact, key: bytes) -> Found | None:
        """For lookups; bad entries are dropped, not the answer."""
        answer = await self._ask(contact, "find-value", {"target": key})
        if answer is None:
            return None
        records = []
        listed = answer.header.get("records")
        for fields in listed[: limits.RECORDS_PER_ANSWER] if isinstance(listed, list) else ():
            try:
                record = decode_record(fields)
            except ProtocolViolation:
                self._refused += 1
                continue
            if record.key == key and record.left_s > 0:
                records.append(record)
        return Found(self._read_contacts(answer.header.get("contacts")), tuple(records))

    async def _ask(self, contact: Contact, method: str, fields: dict[str, Any]) -> Message | None:
        """One call; the table learns from its outcome. Never raises for what a peer does."""
        self._calls += 1
        message = Message(method, fields)
        try:
            answer = await call(
                self._host, contact.peer, DHT_PROTOCOL, message, timeout_s=self._patience(contact),
                addresses=contact.addresses, message_bytes_max=limits.ANSWER_BYTES_MAX,
            )  # fmt: skip
        except PeerdError as error:
            log.debug("dht %s at %s failed: %s", method, contact.peer.short, error)
            self._table.failed(contact)
            return None
        self._answered(contact)
        return answer

    def _patience(self, contact: Contact) -> float:
        connection = self._host.connection(contact.peer)
        rtt = None if connection is None else connection.rtt_s
        if rtt is None:
            return limits.RPC_TIMEOUT_S
        return min(limits.RPC_TIMEOUT_S, max(limits.RPC_TIMEOUT_MIN_S, limits.RPC_RTTS * rtt))

    def _answered(self, contact: Contact) -> None:
        known = self._table.find(contact.peer)
        if known is not None:
            self._table.answered(known)
            return
        if DHT_PROTOCOL not in self._host.protocols_of(contact.peer) and self._host.protocols_of(contact.peer):
            return
        connection = self._host.connection(contact.peer)
        addresses = contact.addresses or (() if connection is None else self._addresses_of(connection))
        to_ping = self._table.offer(Contact(contact.peer, addresses))
        self._wake.set()
        if to_ping is not None and to_ping.id not in self._pinging and self._tasks is not None:
            self._pinging.add(to_ping.id)
            self._background = [task for task in self._background if not task.done()]
            self._background.append(self._tasks.create_task(self._ping_head(to_ping), name="dht ping"))

    async def _ping_head(self, contact: Contact) -> None:
        try:
            await self._ask(contact, "ping", {})
        finally:
            self._pinging.discard(contact.id)

    def _read_contacts(self, listed: object) -> list[Contact]:
        contacts: list[Contact] = []
        for entry in listed[: self.config.ksize] if isinstance(listed, list) else ():
            try:
                peer_bytes, address_list = entry
                peer = PeerId.from_bytes(peer_bytes)
                addresses = tuple(Multiaddr.decode(raw) for raw in address_list[: limits.CONTACT_ADDRESSES_MAX])
            except (TypeError, ValueError, InvalidAddress, ProtocolViolation):
                self._refused += 1
                continue
            if peer != self._host.peer_id:
                contacts.append(Contact(peer, addresses))
        return contacts

    # --- answering ---

    def _contacts_for(self, target: object, asker: PeerId) -> list[list[Any]]:
        if not isinstance(target, bytes) or len(target) != limits.KEY_BYTES:
            raise ProtocolViolation("A target has 32 bytes.")
        near = self._table.find_neighbors(Target(target), exclude=Target(node_id_of(asker)))
        return [[contact.peer.multihash, [address.encode() for address in contact.addresses]] for contact in near]

    async def _answer_ping(self, peer: PeerId, message: Message) -> Message:
        return Message("pong", {})

    async def _answer_find_node(self, peer: PeerId, message: Message) -> Message:
        return Message("nodes", {"contacts": self._contacts_for(message.header.get("target"), peer)})

    async def _answer_find_value(self, peer: PeerId, message: Message) -> Message:
        key = message.header.get("target")
        contacts = self._contacts_for(key, peer)
        assert isinstance(key, bytes)
        held = list(self._store.get(key, self._ports.clock.now()))
        held += [self._sealed(found) for found in self._publications.values() if found.key == key]
        listed: list[list[object]] = []
        room = 48 << 10
        for record in merge_records(held)[: limits.RECORDS_PER_ANSWER]:
            room -= record.size_bytes
            if room < 0:
                break
            listed.append(encode_record(record))
        return Message("values", {"contacts": contacts, "records": listed})

    async def _answer_store(self, peer: PeerId, message: Message) -> Message:
        listed = message.header.get("records")
        if not isinstance(listed, list) or len(listed) > limits.RECORDS_PER_CALL:
            raise ProtocolViolation("A store has a list of records.")
        now = self._ports.clock.now()
        if not self._store.admit(peer.multihash, len(listed), now):
            raise LimitExceeded("Too many stores; slow down.")
        outcomes = []
        for fields in listed:
            record = decode_record(fields)
            if record.publisher != peer and not await self._vouched(record.publisher):
                raise ProtocolViolation("A record is taken from its publisher, or when its publisher can be reached.")
            connection = self._host.connection(record.publisher)
            group = address_group(None if connection is None else connection.remote_address)
            outcome = self._store.put(record, group, self._ports.clock.now())
            outcomes.append(outcome.value)
            if outcome in (Outcome.FULL, Outcome.RATE):
                raise LimitExceeded("No room for this record here.")
        return Message("stored", {"outcomes": outcomes})

    async def _vouched(self, publisher: PeerId) -> bool:
        """Whether the publisher of a relayed record is somebody who can be reached."""
        try:
            await self._host.connect(publisher, await self.find_peer(publisher))
        except PeerdError:
            return False
        return True
