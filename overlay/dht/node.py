"""The DHT's shell: one node of it. Owns the table, the store, our publications, and the task group that keeps them fresh.

A contact enters the table only after it answered a request of ours over an authenticated connection, or asked over one and said
where it serves the DHT; clients never enter. Nodes leave when they can't be dialled, or stay silent twice. Knows nothing of what
values mean. Time and randomness come from ports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from kademlia.node import Node

from overlay.connection import Connection
from overlay.dht import limits
from overlay.dht.acquaintances import Acquaintances
from overlay.dht.following import FollowedKey
from overlay.dht.freshness import NEVER, Freshness, id_in_part
from overlay.dht.lookup import Found, LookupReport, NodeLookup, ValueLookup
from overlay.dht.neighbourhoods import Neighbourhoods
from overlay.dht.offering import Offering
from overlay.dht.pages import Page, lacks, last_page, page_after, read_cursor
from overlay.dht.protocol import DHT, DhtProtocol, is_gone
from overlay.dht.publishing import Publication, Publications
from overlay.dht.records import Record, RecordName, location_of, merge
from overlay.dht.store import Put, RecordStore, StoreRate
from overlay.dht.table import Contact, Table, group_of, node_id_of
from overlay.errors import PeerdError, ProtocolRefused, TimedOut
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports

log = logging.getLogger(__name__)

UNVERIFIED = "unverified"
"""The address group of all those whose address nobody has seen lately."""

Meeting = tuple[PeerId | None, Sequence[Multiaddr]]
Answer = tuple[Contact, Found]


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """What a DHT node is told."""

    server: bool = True
    """False for a node that others can't dial: it asks, and is never asked."""
    ksize: int = limits.KSIZE
    exempt_private: bool = True
    """Whether loopback and private addresses are free of the limits on address groups."""


@dataclass(frozen=True, slots=True)
class DhtStatistics:
    """Immutable counters."""

    contacts: int
    published: int
    stored: int
    stored_bytes: int
    calls: int
    failures: int
    put_off: int
    """Answers for which there was no room on the uplink: their askers were told to ask again."""


LookupListener = Callable[[LookupReport], None]


class Dht:
    """``async with Dht(host, ports, config) as dht``. Every method is for the loop's thread."""

    def __init__(self, host: Host, ports: Ports, config: DhtConfig | None = None) -> None:
        self.config = config or DhtConfig()
        self._host = host
        self._ports = ports
        self._self = Contact(host.peer_id)
        self._table = Table(self._self, self.config.ksize)
        self._store = RecordStore()
        self._rate = StoreRate()
        self._publications = Publications(host.identity)
        self._neighbourhoods = Neighbourhoods()
        self._life = ports.randomness.token(limits.LIFE_BYTES)
        self._salt = ports.randomness.token(limits.LIFE_BYTES)
        self._protocol = DhtProtocol(host, self, exempt_private=self.config.exempt_private)
        self._offering = Offering(
            self._publications, self._neighbourhoods, self._protocol, self, self.config.ksize, self._now, self._woken
        )
        self._tasks: asyncio.TaskGroup | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[bytes, int] = {}
        self._refused: dict[PeerId, float] = {}
        self._freshness = Freshness(self._table)
        self._remembered = Acquaintances(limits.REMEMBERED_MAX)
        self._lost = Acquaintances(limits.LOST_MAX)
        self._lost_due = 0.0
        self._wake = asyncio.Event()
        self._closing = False
        self.on_lookup: LookupListener | None = None
        """Hears what each lookup for a key took; for measurements."""

    # --- life ---

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        now = self._now()
        self._freshness.begin(now)
        self._lost_due = now + limits.LOST_RETRY_S
        if self.config.server:
            self._protocol.serve()
        self._host.add_connection_listener(_ignore, self._connection_closed)
        self._host.add_introduction_listener(self._introduced)
        self._upkeep = self._tasks.create_task(self._keep_up(), name="dht upkeep")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = self._tasks
        assert tasks is not None
        self._closing = True
        if self.config.server:
            self._protocol.stop()
        if self._upkeep is not None:
            self._upkeep.cancel()
        for task in list(self._running.values()):
            task.cancel()
        await tasks.__aexit__(None, None, None)

    def _now(self) -> float:
        return self._ports.clock.now()

    def _woken(self) -> None:
        """What is due next may be another thing now."""
        self._wake.set()

    def spawn(self, name: str, work: Coroutine[Any, Any, None], prefix: str = "", at_once: int = 0) -> bool:
        """Run once per name, and at most ``at_once`` with that prefix; else the work is left undone."""
        crowded = bool(at_once) and sum(1 for found in self._running if found.startswith(prefix)) >= at_once
        if self._tasks is None or self._closing or name in self._running or crowded:
            work.close()
            return False
        task = self._tasks.create_task(work, name=f"dht {name}")
        self._running[name] = task
        task.add_done_callback(lambda _: self._running.pop(name, None))
        return True

    # --- facts ---

    @property
    def ready(self) -> bool:
        """Whether any other DHT server is known."""
        return len(self._table) > 0

    def statistics(self) -> DhtStatistics:
        return DhtStatistics(
            len(self._table),
            len(self._publications),
            self._store.count,
            self._store.size_bytes,
            self._protocol.calls,
            self._protocol.failures,
            self._protocol.put_off,
        )

    def known_peers(self) -> list[tuple[PeerId, tuple[Multiaddr, ...]]]:
        """Contacts and where they were, to be saved for the next start."""
        return [(contact.peer, self._addresses(contact)) for contact in self._table.contacts()]

    def _addresses(self, contact: Contact) -> tuple[Multiaddr, ...]:
        return self._host.address_book.addresses(contact.peer, self._now()) or contact.addresses

    # --- joining ---

    async def bootstrap(self, peers: Sequence[Meeting]) -> int:
        """Meet peers, then look for ourselves. Returns how many of them serve the DHT; may be called again."""
        met = await asyncio.gather(*(self._meet(peer, tuple(addresses)) for peer, addresses in peers))
        answers = [answer for answer in met if answer is not None]
        if answers:
            await self._look_for_self(answers)
        return len(answers)

    async def _meet(self, peer: PeerId | None, addresses: tuple[Multiaddr, ...]) -> Answer | None:
        """The first question of the look for ourselves tells as well whether a peer serves the DHT."""
        if peer == self._host.peer_id:
            return None
        try:
            connection = await self._host.connect(peer, addresses)
        except PeerdError as error:
            log.debug("bootstrap peer %s was not reached: %s", peer or addresses, error)
            return None
        contact = self._contact_of(connection.remote_peer, addresses)
        found = await self._protocol.call_find_node(contact, self._self, timeout_s=limits.RPC_DIAL_TIMEOUT_S)
        return None if found is None else (contact, found)

    def _contact_of(self, peer: PeerId, addresses: Sequence[Multiaddr] = ()) -> Contact:
        known = self._host.address_book.addresses(peer, self._now()) or tuple(addresses)
        connection = self._host.connection(peer)
        remote = None if connection is None else connection.remote_address
        at = remote or (known[0] if known else None)
        return Contact(peer, known, group_of(at, exempt_private=self.config.exempt_private))

    async def _look_for_self(self, answers: Sequence[Answer] = ()) -> None:
        """``answers``: what some have said already."""
        nearest = [contact.id for contact in await self._closest_to(self._self, answers=answers)]
        self._freshness.looked_for_self(nearest, self._now())
        self._wake.set()

    def _lookup_for(
        self,
        target: Node,
        requests_max: int = limits.LOOKUP_RPCS_MAX,
        at_once: int = limits.ALPHA,
        wanted: int | None = None,
        known: Sequence[Contact] = (),
    ) -> NodeLookup:
        start, ksize = [*self._table.find_neighbors(target, self.config.ksize), *known], self.config.ksize
        return NodeLookup(self._protocol, target, start, ksize, self._self.id, requests_max, at_once, wanted)

    async def _closest_to(
        self,
        target: Node,
        requests_max: int = limits.LOOKUP_RPCS_MAX,
        at_once: int = limits.ALPHA,
        answers: Sequence[Answer] = (),
    ) -> list[Contact]:
        lookup = self._lookup_for(target, requests_max, at_once)
        for contact, found in answers:
            lookup.begin_with(contact, found)
        closest = await lookup.find()
        self._looked(lookup)
        return closest

    def _looked(self, lookup: NodeLookup) -> None:
        for contact in lookup.passed_over():
            self._silent(contact)

    # --- publishing ---

    def publish(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> None:
        """Keep ``value`` published from now on; a new value replaces the former. Raises LimitExceeded."""
        publication = self._set(key, subkey, value, ttl_s)
        self._offering.offer_soon(publication)

    async def publish_and_wait(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> int:
        """As `publish`; returns how many nodes hold it. Cancelled, it goes on at its next turn."""
        publication = self._set(key, subkey, value, ttl_s)
        await self._offering.offer(publication)
        return len(publication.holders)

    async def withdraw(self, key: bytes, subkey: bytes) -> None:
        """Replace the record by a tombstone at its holders; the tombstone lives as long as the record would have."""
        before = self._publications.get(key, subkey)
        if before is None or before.record.is_withdrawn:
            return
        await self._offering.offer(self._set(key, subkey, b"", before.record.ttl_s))

    def abandon(self, key: bytes, subkey: bytes) -> None:
        """Renew a record no more: its holders forget it at the end of its life. Costs no message, unlike `withdraw`."""
        self._publications.abandon(key, subkey)

    def _set(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> Publication:
        return self._publications.set(key, subkey, value, ttl_s, self._now(), self._ports.wall_clock.now_s())

    async def nearest_to(self, target: Node, wanted: int, *, fresh_s: float = limits.LOCATED_S) -> tuple[Contact, ...]:
        """The ``wanted`` nodes nearest to ``target`` or more: as they were found not long ago, or by a lookup."""
        known = self._neighbourhoods.members(target.id, wanted, self._now(), fresh_s)
        if known:
            return known
        wanted = max(wanted, self._neighbourhoods.wanted(target.id))
        start, assumed = self._neighbourhoods.start(target.id, self._now(), fresh_s)
        lookup = self._lookup_for(target, wanted=wanted, known=start)
        for contact in assumed:
            lookup.begin_with(contact, Found(()))
        found = [self._as_connected(contact) for contact in await lookup.find()]
        self._looked(lookup)
        late = dict.fromkeys(contact.id for contact in lookup.passed_over())
        named = [contact for contact in lookup.named() if contact.id not in late]
        failed = [*lookup.failed(), *late]
        self._neighbourhoods.located(target.id, found, wanted, named, failed, self._now(), assumed)
        self._offering.neighbourhood_found(target.id, found)
        return tuple(found)

    def _as_connected(self, contact: Contact) -> Contact:
        """A contact with the address group that it was met at: what others write of its addresses may be made up."""
        known = self._table.get(contact.id)
        if known is not None:
            return known
        connection = self._host.connection(contact.peer)
        if connection is None or connection.remote_address is None:
            group = UNVERIFIED
        else:
            group = group_of(connection.remote_address, exempt_private=self.config.exempt_private)
        return Contact(contact.peer, contact.addresses, group)

    # --- reading ---

    def follow(self, key: bytes) -> FollowedKey:
        """For a key that is read again and again."""
        return FollowedKey(key, self, self._salt, self._now)

    async def ask_for(self, contact: Contact, key: bytes, since: bytes, known: Sequence[bytes]) -> Found | None:
        """One holder's part of a followed key."""
        place = location_of(key)
        found = await self._protocol.call_find_value(contact, key, Node(place), since, limits.NEAR, known)
        if found is None:
            self._neighbourhoods.lost(place, contact)
        else:
            self._neighbourhoods.named(place, contact, found.contacts, self._now())
        return found

    def correct(self, contact: Contact, records: Sequence[Record]) -> None:
        """Tell a holder what it lacks; it takes it from its publisher."""
        work = self._correct(contact, list(records))
        self.spawn(f"correct {contact.id.hex()}", work, "correct ", limits.FOREIGN_CHECKS_AT_ONCE)

    async def get(self, key: bytes) -> tuple[Record, ...]:
        """Live records of a key, asked for once: verified, merged, in a fixed order; ours and those we hold are among them."""
        target = Node(location_of(key))
        start = self._table.find_neighbors(target, self.config.ksize)
        lookup = ValueLookup(self._protocol, key, target, start, self.config.ksize, self._self.id)
        merge(lookup.merged, self.records_of(key))
        await lookup.find()
        self._looked(lookup)
        if self.on_lookup is not None:
            self.on_lookup(lookup.report)
        merge(lookup.merged, self.records_of(key))
        for contact, records in lookup.corrections():
            self.correct(contact, records)
        live = [record for record in lookup.merged.values() if not record.is_withdrawn]
        return tuple(sorted(live, key=lambda record: record.name))

    async def _correct(self, contact: Contact, records: list[Record]) -> None:
        await self._protocol.call_store(contact, records)

    async def find_peer(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where a peer may be dialled; empty when nobody knows."""
        connection = self._host.connection(peer)
        known = self._host.address_book.addresses(peer, self._now())
        if connection is not None and known:
            return known
        target = Contact(peer)
        start = self._table.find_neighbors(target, self.config.ksize)
        near = self._table.get(target.id)
        lookup = NodeLookup(
            self._protocol, target, [*([near] if near else []), *start], self.config.ksize, self._self.id
        )
        await lookup.find()
        self._looked(lookup)
        found = lookup.seen.get(target.id)
        return tuple(dict.fromkeys((*known, *(found.addresses if found else ()))))

    # --- what the wire asks ---

    def closest(self, target: Node, asker: PeerId) -> list[Contact]:
        """From the table, and around a key that we publish under the members that we found; neither the asker nor ourselves."""
        near = self._table.find_neighbors(target, self.config.ksize, exclude=Contact(asker))
        exact = self._table.get(target.id)
        if exact is not None and exact.peer != asker:
            near.insert(0, exact)
        if self._publications.lies_at(target.id):
            told = self._neighbourhoods.told(target.id, self._now(), near)
            near = sorted([*near, *(found for found in told if found.peer != asker)], key=target.distance_to)
        return near[: self.config.ksize]

    def held(self, key: bytes) -> tuple[Record, ...]:
        """What this node holds for others under a key."""
        return self._store.get(key, self._now())

    def page_of(self, key: bytes, since: bytes | None, known: Sequence[bytes] = ()) -> Page:
        """What an asker with that cursor hasn't been told, nor knows; see `overlay.dht.pages`."""
        cursor, now = read_cursor(since or b"", self._life), self._now()
        published = self._publications.newer(key, cursor.published, now)
        stored = self._store.newer(key, cursor.stored, now)
        if since is None:
            return last_page(cursor, published, stored)
        page = page_after(cursor, published, stored, dict.fromkeys(known))
        if since or not known:
            return page
        ours = [entry.record.fingerprint for entry in published]
        return replace(page, lacks=lacks(known, self._store.fingerprints(key, now), ours))

    def records_of(self, key: bytes) -> list[Record]:
        """What we publish and what we hold, merged."""
        merged: dict[RecordName, Record] = {}
        merge(merged, self._store.get(key, self._now()))
        merge(merged, self._publications.records_of(key))
        return list(merged.values())

    def offer(self, record: Record | None, sender: PeerId) -> tuple[Put, int]:
        """A store request: (outcome, the sequence held)."""
        now = self._now()
        if not self._rate.admit(sender.multihash, now):
            return Put.RATE, 0
        if record is None:
            return Put.INVALID, 0
        if record.publisher == self._host.peer_id:
            ours = self._publications.get(record.key, record.subkey)
            return Put.UNCHANGED, 0 if ours is None else ours.record.sequence
        held = self._store.sequence_of(record)
        if record.publisher != sender:
            if held is None or held < record.sequence:
                self._check_with_publisher(record)
            return Put.FOREIGN, held or 0
        outcome = self._store.put(record, now, self._group_of(sender))
        return outcome, self._store.sequence_of(record) or 0

    def _check_with_publisher(self, record: Record) -> None:
        work = self._fetch_from_publisher(record.publisher, record.key)
        name = f"check {record.publisher.short} {record.key.hex()}"
        self.spawn(name, work, "check ", limits.FOREIGN_CHECKS_AT_ONCE)

    async def _fetch_from_publisher(self, publisher: PeerId, key: bytes) -> None:
        """A record that somebody else brought is taken from its publisher, or not at all."""
        contact, target = self._contact_of(publisher), Node(location_of(key))
        found = await self._fetch(contact, key, target, b"")
        if found is not None and found.later_s:
            await asyncio.sleep(found.later_s)
            await self._fetch(contact, key, target, found.cursor)

    async def _fetch(self, contact: Contact, key: bytes, target: Node, since: bytes) -> Found | None:
        found = await self._protocol.call_find_value(contact, key, target, since)
        for record in () if found is None else found.records:
            if record.publisher == contact.peer:
                self._store.put(record, self._now(), self._group_of(contact.peer))
        return found

    def _group_of(self, peer: PeerId) -> str:
        connection = self._host.connection(peer)
        remote = None if connection is None else connection.remote_address
        return group_of(remote, exempt_private=False)

    def _introduced(self, peer: PeerId) -> None:
        """A peer said what it speaks, and by that maybe that it serves the DHT."""
        book = self._host.address_book
        if DHT in book.protocols(peer):
            known, is_near = book.addresses(peer, self._now()), self._protocol.trusts_private(peer)
            self.heard_from(peer, [found for found in known if is_near or not found.is_loopback_or_private])

    def heard_from(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> None:
        """A peer that asked, or said what it speaks: one that serves the DHT at ``addresses`` enters the table, as if it had answered.

        It told us so over an authenticated connection; a question back would tell no more. What could not be dialled a moment ago
        does not come in by asking.
        """
        now, book = self._now(), self._host.address_book
        known = self._table.get(node_id_of(peer))
        if known is not None:
            live = book.addresses(peer, now)
            if not all(address in live for address in addresses):
                book.add(peer, reversed(addresses), now)
            self._renew(known, now)
        elif self._refused.get(peer, 0.0) <= now and any(book.may_dial(address, now) for address in addresses):
            book.add(peer, reversed(addresses), now)
            self._admit(Contact(peer))

    def _renew(self, known: Contact, now: float) -> None:
        known.seen = now
        known.addresses = self._addresses(known)[: limits.ADDRESSES_PER_CONTACT]
        self._table.renew(known)

    def _consider(self, peer: PeerId) -> None:
        self.spawn(f"consider {peer}", self._ask_whether_alive(peer), "consider ", limits.CONSIDERED_AT_ONCE)

    async def _ask_whether_alive(self, peer: PeerId) -> None:
        known = self._table.get(node_id_of(peer))
        await self._protocol.call_ping(self._contact_of(peer, () if known is None else known.addresses))

    def call_ended(self, contact: Contact, error: PeerdError | None) -> None:
        """The one place where contacts enter and leave the table."""
        if error is None:
            self._failures.pop(contact.id, None)
            self._admit(contact)
            return
        if isinstance(error, ProtocolRefused):
            self._refused[contact.peer] = self._now() + limits.REFUSED_REMEMBERED_S
            while len(self._refused) > limits.REFUSED_REMEMBERED_MAX:
                self._refused.pop(next(iter(self._refused)))
        unreached = isinstance(error, TimedOut) and self._host.connection(contact.peer) is None
        if is_gone(error) or unreached:
            self._neighbourhoods.gone(contact)
        self._silent(contact, is_gone=is_gone(error) or unreached)

    def _silent(self, contact: Contact, *, is_gone: bool = False) -> None:
        """A contact didn't answer: after a few times, or when it is gone for sure, it leaves the table."""
        known = self._table.get(contact.id)
        if known is None:
            return
        self._failures[contact.id] = self._failures.get(contact.id, 0) + 1
        if is_gone or self._failures[contact.id] >= limits.FAILURES_MAX:
            self._failures.pop(contact.id, None)
            self._table.remove_contact(known)
            self._lost.add(known.peer, self._addresses(known))
            if self._freshness.contact_left(self._now()):
                self._wake.set()

    def _admit(self, contact: Contact) -> None:
        """A contact answered, or showed itself."""
        now = self._now()
        known = self._table.get(contact.id)
        if known is not None and known.addresses:
            self._renew(known, now)
            return
        fresh = self._contact_of(contact.peer, contact.addresses)
        fresh.seen = now
        oldest = self._table.add_contact(fresh)
        self._lost.forget(fresh.peer)
        self._remembered.add(fresh.peer, fresh.addresses)
        if oldest is not None:
            if now - oldest.seen > limits.CONTACT_FRESH_S:
                self._consider(oldest.peer)
        elif self._table.get(fresh.id) is not None and self._publications.wanted_by(fresh, self.config.ksize):
            self.spawn(f"hand over {fresh.peer}", self._offering.hand_over(fresh))

    def _connection_closed(self, connection: Connection) -> None:
        """A connection that broke is a reason to look after its peer; one that was left is none, and looking would dial again."""
        if connection.was_left:
            return
        peer = connection.remote_peer
        if self._table.get(node_id_of(peer)) is not None:
            self._consider(peer)

    # --- upkeep ---

    async def _keep_up(self) -> None:
        while True:
            self._wake.clear()
            wait_s = max(self._next_due() - self._now(), limits.UPKEEP_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
                await asyncio.sleep(limits.UPKEEP_S)
            except TimeoutError:
                pass  # something is due
            self.upkeep(self._now())

    def _next_due(self) -> float:
        """The moment of the next piece of upkeep."""
        lost = self._lost_due if self._lost else NEVER
        return min(self._freshness.next_due(), lost, self._publications.next_due())

    def upkeep(self, now: float) -> None:
        """At most once a second: expiry, what is due to be published, lookups that keep the table fresh."""
        self._store.expire(now)
        for publication in self._publications.due(now):
            renewed = self._publications.renewed(publication, now, self._ports.wall_clock.now_s())
            self._offering.offer_soon(renewed)
        if self._freshness.take_self(now):
            if self.ready:
                self.spawn("look for self", self._look_for_self())
            else:
                self.spawn("meet again", self._meet_again())
        depth = self._freshness.take_part(now)
        if depth is not None:
            self.spawn(f"refresh {depth}", self._refresh(depth))
        if self._lost and now >= self._lost_due:
            self._lost_due = now + limits.LOST_RETRY_S
            self.spawn("look for the lost", self._look_for_lost())

    async def _meet_again(self) -> None:
        await self.bootstrap(self._remembered.items())

    async def _look_for_lost(self) -> None:
        """Try a few of those that vanished. One that is back may have come with many: look who is near us now."""
        for peer in self._lost.draw(limits.LOST_RETRIES, self._ports.randomness.below):
            if await self._protocol.call_ping(self._contact_of(peer, self._lost.addresses(peer))):
                self._lost.forget(peer)
                self._freshness.look_for_self_at(self._now())
                self._wake.set()

    async def _refresh(self, depth: int) -> None:
        """Look into a part of the id space, wherever the draw falls in it."""
        target = id_in_part(self._self.long_id, depth, self._ports.randomness.token(limits.ID_BYTES))
        await self._closest_to(
            Node(target), limits.REFRESH_RPCS_MAX, at_once=1
        )  # the later ones are asked in that part


def _ignore(_: Connection) -> None:
    """Nothing is to be done for a new connection: a server shows itself by asking, or by answering."""
