"""`/peerd/dht/1`: find_node, find_value, store and ping as unary calls, both sides.

Validates every answer entry by entry: a bad entry is dropped, not the answer; a call never raises (None is no answer).
What is kept and who is known belongs to the node; this file asks it through `DhtPeer`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.lookup import Found
from overlay.dht.pages import Page
from overlay.dht.records import Record, decode_records, encode_records
from overlay.dht.store import Put
from overlay.dht.table import Contact, group_of, node_id_of
from overlay.dht.under_way import AnswersUnderWay
from overlay.errors import (
    ConnectionLost,
    DialError,
    InvalidAddress,
    PeerdError,
    ProtocolRefused,
    ProtocolViolation,
    StreamReset,
)
from overlay.host import Host
from overlay.identity import PEER_ID_BYTES_MAX, PeerId, decode_address_or_none
from overlay.multiaddr import ADDRESSES_CACHED, Multiaddr
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call, serve_unary
from overlay.stream import Stream

log = logging.getLogger(__name__)

DHT = "/peerd/dht/1"
RECORDS_PART = "records"
KNOWN_PART = "known"
LEAVING = b""
"""For the share of what may be under way: all whose connection is being left."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A validated answer to a store: the outcome and the held sequence of each record, and nodes near their place."""

    outcomes: tuple[tuple[Put, int], ...]
    contacts: tuple[Contact, ...]


class DhtPeer(Protocol):
    """What the wire asks of the node behind it."""

    def closest(self, target: Node, asker: PeerId) -> list[Contact]: ...
    def page_of(self, key: bytes, since: bytes | None, known: Sequence[bytes] = ()) -> Page:
        """What we publish and hold under a key, after the cursor that an asker brought (None from one that knows no pages).

        ``known``: fingerprints of what the asker needs no more.
        """

    def offer(self, record: Record | None, sender: PeerId) -> tuple[Put, int]: ...
    def heard_from(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> None:
        """An authenticated request came in; ``addresses``: where it says that it serves the DHT, none of a client."""

    def call_ended(self, contact: Contact, error: PeerdError | None) -> None:
        """A call of ours was answered, or failed."""


class DhtProtocol:
    """The node's methods on the wire, and its calls to others."""

    def __init__(self, host: Host, peer: DhtPeer, *, exempt_private: bool) -> None:
        self._host = host
        self._peer = peer
        self._exempt_private = exempt_private
        self._told: tuple[tuple[Multiaddr, ...], list[bytes]] = ((), [])
        self._serves = False
        self._under_way = AnswersUnderWay()
        self._now = host.ports.clock.now
        self.calls = 0
        self.failures = 0

    def serve(self) -> None:
        """Answer others: makes this node a DHT server, which says so and where it is with whatever it asks."""
        self._serves = True
        serve_unary(
            self._host,
            DHT,
            {
                "ping": self._answer_ping,
                "find_node": self._answer_find_node,
                "find_value": self._answer_find_value,
                "store": self._answer_store,
            },
            message_bytes_max=limits.MESSAGE_BYTES_MAX,
            written=self._see_it_arrive,
        )

    # --- answers ---

    async def _answer_ping(self, peer: PeerId, request: Message) -> Message:
        self._heard_from(peer, request)
        return Message("pong", {})

    async def _answer_find_node(self, peer: PeerId, request: Message) -> Message:
        target = request.header.get("target")
        if not isinstance(target, bytes) or len(target) != limits.ID_BYTES:
            raise ProtocolViolation("A DHT request names no target.")
        self._heard_from(peer, request)
        return Message("nodes", {"nodes": self._describe(target, peer)})

    async def _answer_find_value(self, peer: PeerId, request: Message) -> Message:
        key, target = request.header.get("key"), request.header.get("target")
        if not isinstance(key, bytes) or not 0 < len(key) <= limits.KEY_BYTES_MAX:
            raise ProtocolViolation("A DHT request names no key.")
        if not isinstance(target, bytes) or len(target) != limits.ID_BYTES:
            raise ProtocolViolation("A DHT request names no target.")
        self._heard_from(peer, request)
        since = request.header.get("since")
        page = self._peer.page_of(key, since if isinstance(since, bytes) else None, _fingerprints(request))
        header: dict[str, Any] = {"nodes": self._describe(target, peer, _count_of(request))}
        records = encode_records(page.records)
        later_s = self._under_way.later_s(self._asker(peer), len(records), self._now())
        if later_s:
            return Message("value", {**header, "later": later_s}, (_records_part(encode_records(())),))
        header |= {"cursor": page.cursor.encode(), "left": page.left_s, "more": page.more, "lacks": page.lacks}
        return Message("value", header, (_records_part(records),))

    async def _answer_store(self, peer: PeerId, request: Message) -> Message:
        self._heard_from(peer, request)
        records = decode_records(_records_bytes(request), limits.STORE_RECORDS_MAX)
        outcomes = [self._peer.offer(record, peer) for record in records]
        header: dict[str, Any] = {"outcomes": [[outcome.value, sequence] for outcome, sequence in outcomes]}
        target = request.header.get("target")
        if isinstance(target, bytes) and len(target) == limits.ID_BYTES:
            header["nodes"] = self._describe(target, peer, _count_of(request))
        return Message("stored", header)

    def _asker(self, peer: PeerId) -> bytes:
        """Who shares a part of what may be under way: a peer's address group, or the peer where groups mean nothing.

        Those that asked on a connection which is being left share one: they could choose to.
        """
        connection = self._host.connection(peer)
        if connection is None:
            return LEAVING
        return group_of(connection.remote_address, exempt_private=self._exempt_private).encode() or peer.multihash

    async def _see_it_arrive(self, stream: Stream, answer: Message) -> None:
        """A long answer is under way until its asker has it, or what the socket took of it has gone."""
        size_bytes = sum(part.size_bytes for part in answer.parts)
        if size_bytes < limits.LONG_ANSWER_BYTES:
            return
        serial = self._under_way.began(self._asker(stream.remote_peer), size_bytes, self._now())
        has_arrived = False
        try:
            async with asyncio.timeout(limits.UNDER_WAY_LIFE_S):
                was_sent = await self._send_all(stream)
                await stream.connection.wait_arrived()
                has_arrived = was_sent
        except (TimeoutError, ConnectionLost):
            log.debug("it isn't known whether an answer has arrived at %s", stream.remote_peer.short)
        finally:
            self._under_way.ended(serial, self._now(), has_arrived=has_arrived)

    async def _send_all(self, stream: Stream) -> bool:
        """Whether the socket took all of it while somebody waited for it."""
        try:
            async with asyncio.timeout(limits.ANSWER_LIFE_S):
                await stream.wait_sent()
        except TimeoutError:
            stream.reset("timed-out")
        except StreamReset:
            log.debug("%s gave up an answer that was on its way", stream.remote_peer.short)
        return stream.error is None

    def stop(self) -> None:
        """Answer no more, and say so by naming no address."""
        self._serves = False
        self._host.unserve(DHT)

    def _heard_from(self, peer: PeerId, request: Message) -> None:
        contact = self._read_node([peer.multihash, request.header.get("at")], trusts_private=self.trusts_private(peer))
        self._peer.heard_from(peer, () if contact is None else contact.addresses)

    def _describe(
        self, target: bytes, asker: PeerId, count: int = limits.KSIZE
    ) -> list[tuple[bytes, tuple[bytes, ...]]]:
        near = self._peer.closest(Node(target), asker)[:count]
        return [(contact.peer.multihash, _written(contact)) for contact in near]

    @property
    def put_off(self) -> int:
        """How many askers were told to ask again later."""
        return self._under_way.put_off

    # --- calls ---

    async def call_ping(self, contact: Contact) -> bool:
        """Whether the peer answers, and serves the DHT."""
        return await self._call(contact, Message("ping", {})) is not None

    async def call_find_node(self, contact: Contact, target: Node, timeout_s: float | None = None) -> Found | None:
        """Nodes near ``target`` that the peer knows."""
        answer = await self._call(contact, Message("find_node", {"target": target.id}), timeout_s)
        return None if answer is None else Found(self._read_nodes(answer.header, contact.peer))

    async def call_find_value(
        self,
        contact: Contact,
        key: bytes,
        target: Node,
        since: bytes = b"",
        near: int = limits.KSIZE,
        known: Sequence[bytes] = (),
    ) -> Found | None:
        """What the peer has under ``key`` after the cursor ``since``, page by page, and the ``near`` nodes nearest to it.

        It tells nothing of records whose fingerprints are ``known``, except which of them it lacks. Where it says to ask later it has
        told no more than the pages before that.
        """
        parts = (_bytes_part(KNOWN_PART, b"".join(known)),) if known else ()
        found: Found | None = None
        for _ in range(limits.PAGES_MAX):
            header: dict[str, Any] = {"key": key, "target": target.id, "count": near, "since": since}
            answer = await self._call(contact, Message("find_value", header, parts))
            if answer is None:
                break
            try:
                page = self._read_value(answer, key, contact.peer, len(known))
            except ProtocolViolation as error:
                self._peer.call_ended(contact, error)
                break
            if page.later_s:
                return page if found is None else replace(found, later_s=page.later_s)
            found = page if found is None else _together(found, page)
            if answer.header.get("more") is not True or not page.cursor or page.cursor == since:
                break
            since, near = page.cursor, 0
        return found

    def _read_value(self, answer: Message, key: bytes, source: PeerId, known: int) -> Found:
        entries = decode_records(_records_bytes(answer), limits.ANSWER_RECORDS_MAX)
        left = answer.header.get("left")
        lives = left if isinstance(left, list) and len(left) == len(entries) else [None] * len(entries)
        good = [
            (record, life)
            for record, life in zip(entries, lives, strict=True)
            if record is not None and record.key == key
        ]
        cursor, lacks = answer.header.get("cursor"), answer.header.get("lacks")
        return Found(
            self._read_nodes(answer.header, source),
            tuple(record for record, _ in good),
            tuple(_life_of(record, life) for record, life in good),
            cursor if isinstance(cursor, bytes) and len(cursor) <= limits.CURSOR_BYTES_MAX else b"",
            _places(lacks, known),
            _later_of(answer.header),
        )

    async def call_store(self, contact: Contact, records: Sequence[Record], near: Node | None = None) -> Stored | None:
        """One outcome and held sequence per record; None when the peer didn't answer. With ``near`` it names nodes near there."""
        part = _records_part(encode_records(records))
        header = {} if near is None else {"target": near.id, "count": limits.NEAR}
        answer = await self._call(contact, Message("store", header, (part,)))
        listed = None if answer is None else answer.header.get("outcomes")
        if answer is None or not isinstance(listed, list) or len(listed) != len(records):
            return None
        outcomes = tuple(_read_outcome(entry) for entry in listed)
        return Stored(outcomes, self._read_nodes(answer.header, contact.peer))

    async def _call(self, contact: Contact, message: Message, timeout_s: float | None = None) -> Message | None:
        self.calls += 1
        if self._serves:
            message = Message(message.kind, {**message.header, "at": self._at()}, message.parts)
        try:
            answer = await call(
                self._host,
                contact.peer,
                DHT,
                message,
                timeout_s=timeout_s or self._timeout_s(contact.peer),
                addresses=contact.addresses,
                message_bytes_max=limits.MESSAGE_BYTES_MAX,
            )
        except PeerdError as error:
            self.failures += 1
            log.debug("dht %s to %s failed: %s", message.kind, contact.peer.short, error)
            self._peer.call_ended(contact, error)
            return None
        self._peer.call_ended(contact, None)
        return answer

    def _at(self) -> list[bytes]:
        """Where others find this node; public addresses first, lest a machine's many bridges crowd them out."""
        addresses = self._host.addresses
        if addresses is not self._told[0]:
            bare = sorted((address.without_peer() for address in addresses), key=_is_private)
            own = Contact(self._host.peer_id, bare)
            self._told = addresses, list(_written(own))
        return self._told[1]

    def _timeout_s(self, peer: PeerId) -> float:
        connection = self._host.connection(peer)
        if connection is None:
            return limits.RPC_DIAL_TIMEOUT_S
        rtt_s = connection.rtt_s
        if rtt_s is None:
            return limits.RPC_TIMEOUT_MAX_S
        return min(limits.RPC_TIMEOUT_MAX_S, limits.RPC_TIMEOUT_MIN_S + 3 * rtt_s)

    def _read_nodes(self, header: Mapping[str, Any], source: PeerId) -> tuple[Contact, ...]:
        """Good entries only; private addresses only from a peer that is itself at one."""
        listed = header.get("nodes")
        if not isinstance(listed, list):
            return ()
        trusts_private = self.trusts_private(source)
        unwanted = (node_id_of(self._host.peer_id), node_id_of(source))
        found: dict[bytes, Contact] = {}
        for entry in listed[: limits.KSIZE]:
            contact = self._read_node(entry, trusts_private=trusts_private)
            if contact is not None and contact.id not in unwanted:
                found.setdefault(contact.id, contact)
        return tuple(found.values())

    def trusts_private(self, source: PeerId) -> bool:
        """Whether private addresses mean something when ``source`` names them: where it is itself at one."""
        connection = self._host.connection(source)
        remote = None if connection is None else connection.remote_address
        return remote is not None and remote.is_loopback_or_private

    def _read_node(self, entry: object, *, trusts_private: bool) -> Contact | None:
        if not isinstance(entry, list) or len(entry) != 2:
            return None
        raw_peer, raw_addresses = entry
        if not isinstance(raw_peer, bytes) or not isinstance(raw_addresses, list):
            return None
        if len(raw_peer) > PEER_ID_BYTES_MAX:
            return None
        raws = tuple([raw for raw in raw_addresses[: limits.ADDRESSES_PER_CONTACT] if _is_short(raw)])
        return _contact(raw_peer, raws, trusts_private, self._exempt_private)


@lru_cache(maxsize=limits.CONTACTS_CACHED)
def _contact(raw_peer: bytes, raws: tuple[bytes, ...], trusts_private: bool, exempt_private: bool) -> Contact | None:
    """What an entry says; the same ones come again and again. Never changed: what enters a table is made anew."""
    try:
        peer = PeerId.from_bytes(raw_peer)
    except InvalidAddress:
        return None
    decoded = [_usable(raw) for raw in raws]
    addresses = [found[0] for found in decoded if found is not None and (trusts_private or not found[1])]
    if not addresses:
        return None
    return Contact(peer, addresses, group_of(addresses[0], exempt_private=exempt_private))


@lru_cache(maxsize=ADDRESSES_CACHED)
def _usable(raw: bytes) -> tuple[Multiaddr, bool] | None:
    """An address that can be dialled, and whether it is a private one."""
    address = decode_address_or_none(raw)
    return None if address is None or not address.is_tcp else (address.without_peer(), address.is_loopback_or_private)


def _is_private(address: Multiaddr) -> bool:
    return address.is_loopback_or_private


def _is_short(raw: object) -> bool:
    """Before anything remembers it: what a peer may make us keep is bounded."""
    return isinstance(raw, bytes) and len(raw) <= limits.ADDRESS_BYTES_MAX


def _written(contact: Contact) -> tuple[bytes, ...]:
    """A peer chooses its own addresses: oversized ones must not make our answers fail."""
    if contact.written is None or contact.written[0] != contact.addresses:
        encoded = [address.encode() for address in contact.addresses]
        fitting = tuple(raw for raw in encoded if len(raw) <= limits.ADDRESS_BYTES_MAX)
        contact.written = contact.addresses, fitting[: limits.ADDRESSES_PER_CONTACT]
    return contact.written[1]


def is_gone(error: PeerdError) -> bool:
    """Whether an error says that the peer is no DHT server now, rather than that it was slow once."""
    return isinstance(error, DialError | ProtocolRefused | ProtocolViolation)


def _count_of(request: Message) -> int:
    """How many nodes an asker wants to be named."""
    count = request.header.get("count")
    return count if type(count) is int and 0 <= count <= limits.KSIZE else limits.KSIZE


def _later_of(header: Mapping[str, Any]) -> float:
    """When to ask again, of an answer that says so."""
    later = header.get("later")
    if isinstance(later, bool) or not isinstance(later, int | float) or not later > 0:
        return 0.0
    return float(max(limits.LATER_MIN_S, min(later, limits.LATER_MAX_S)))


def _life_of(record: Record, left: object) -> float:
    """What a holder says of a record's life, within what its publisher gave it."""
    return float(min(left, record.ttl_s)) if type(left) is int and left > 0 else float(record.ttl_s)


def _together(first: Found, then: Found) -> Found:
    return Found(
        first.contacts, (*first.records, *then.records), (*first.left_s, *then.left_s), then.cursor, first.lacks
    )


def _fingerprints(request: Message) -> list[bytes]:
    """What an asker knows; of a longer list than a key can hold nothing is read."""
    size = limits.FINGERPRINT_BYTES
    for part in request.parts:
        if part.name == KNOWN_PART and len(part.data) <= limits.RECORDS_PER_KEY_MAX * size:
            data = bytes(part.data)
            return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
    return []


def _places(listed: object, count: int) -> tuple[int, ...]:
    if not isinstance(listed, list):
        return ()
    return tuple([place for place in listed[: limits.LACKS_TOLD_MAX] if type(place) is int and 0 <= place < count])


def _records_part(packed: bytes) -> Part:
    return _bytes_part(RECORDS_PART, packed)


def _bytes_part(name: str, data: bytes) -> Part:
    return Part(name, "uint8", (len(data),), data)


def _records_bytes(message: Message) -> bytes:
    if len(message.parts) != 1 or message.parts[0].name != RECORDS_PART:
        raise ProtocolViolation("A DHT message carries no records.")
    return bytes(message.parts[0].data)


def _read_outcome(entry: object) -> tuple[Put, int]:
    if isinstance(entry, list) and len(entry) == 2:
        code, sequence = entry
        if isinstance(code, str) and type(sequence) is int and 0 <= sequence < limits.SEQUENCE_MAX:
            known = {put.value: put for put in Put}
            return known.get(code, Put.INVALID), sequence
    return Put.INVALID, 0
