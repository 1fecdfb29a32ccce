"""Signed, sequenced, expiring records. Pure.

A key holds many records, one per (publisher, subkey). The publisher's sequence orders its own records only; the time to
live is counted by each holder from receipt, since home clocks are wrong. An empty value is a tombstone: withdrawn.
The signature covers a domain and the canonical msgpack of all other fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import msgpack

from overlay.dht import limits
from overlay.errors import InvalidAddress, LimitExceeded, ProtocolViolation
from overlay.identity import SIGNATURE_BYTES, Identity, PeerId, verify

DOMAIN = b"peerd-dht-record:1"
FIELDS = 7

RecordName = tuple[bytes, bytes]
"""(publisher, subkey): what a record is called within its key."""


@dataclass(frozen=True, slots=True)
class Record:
    """One publisher's value under (key, subkey)."""

    key: bytes
    publisher: PeerId
    subkey: bytes
    sequence: int
    ttl_s: int
    value: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    name: RecordName = field(init=False, repr=False, compare=False)
    fingerprint: bytes = field(init=False, repr=False, compare=False)
    """A few bytes by which two nodes that both hold this very record know that they do."""
    size_bytes: int = field(init=False, repr=False, compare=False)
    """What a holder counts for it."""

    def __post_init__(self) -> None:
        """What is asked of each record of a key, again and again."""
        size_bytes = len(self.key) + len(self.subkey) + len(self.value) + limits.RECORD_OVERHEAD_BYTES
        object.__setattr__(self, "name", (self.publisher.multihash, self.subkey))
        object.__setattr__(self, "fingerprint", self.signature[: limits.FINGERPRINT_BYTES])
        object.__setattr__(self, "size_bytes", size_bytes)

    @property
    def is_withdrawn(self) -> bool:
        return not self.value


def location_of(key: bytes) -> bytes:
    """Where a key lies among node ids; a peer id's bytes lie where that peer is."""
    return hashlib.sha256(key).digest()


def _signed_bytes(key: bytes, publisher: bytes, subkey: bytes, sequence: int, ttl_s: int, value: bytes) -> bytes:
    packed: bytes = msgpack.packb([key, publisher, subkey, sequence, ttl_s, value])
    return DOMAIN + packed


def seal_record(identity: Identity, key: bytes, subkey: bytes, sequence: int, ttl_s: int, value: bytes) -> Record:
    """Sign a record of our own. Raises LimitExceeded."""
    if (
        not 0 < len(key) <= limits.KEY_BYTES_MAX
        or len(subkey) > limits.SUBKEY_BYTES_MAX
        or len(value) > limits.VALUE_BYTES_MAX
        or not 0 < ttl_s <= limits.TTL_S_MAX
    ):
        raise LimitExceeded("A record for the DHT is over its size limit, or lives longer than an hour.")
    publisher = identity.peer_id
    signature = identity.sign(_signed_bytes(key, publisher.multihash, subkey, sequence, ttl_s, value))
    return Record(key, publisher, subkey, sequence, ttl_s, value, signature)


def encode_record(record: Record) -> bytes:
    """Canonical msgpack of all fields."""
    packed: bytes = msgpack.packb(
        [
            record.key,
            record.publisher.multihash,
            record.subkey,
            record.sequence,
            record.ttl_s,
            record.value,
            record.signature,
        ]
    )
    return packed


def decode_record(data: bytes) -> Record:
    """A record whose signature is good. Raises ProtocolViolation."""
    if len(data) > limits.RECORD_BYTES_MAX:
        raise ProtocolViolation("A peer sent a DHT record over the size limit.")
    return _decoded(data) if len(data) <= limits.CACHED_RECORD_BYTES_MAX else _decode(data)


@lru_cache(maxsize=limits.RECORDS_CACHED)
def _decoded(data: bytes) -> Record:
    """Every holder of a key gives the same records, and gives them again to whoever looks again: each is verified once."""
    return _decode(data)


def _decode(data: bytes) -> Record:
    try:
        fields = msgpack.unpackb(
            data, max_array_len=FIELDS, max_map_len=0, max_ext_len=0, max_str_len=0, max_bin_len=len(data)
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolViolation("A peer sent a DHT record that can't be read.") from error
    if not isinstance(fields, list) or len(fields) != FIELDS:
        raise ProtocolViolation("A peer sent a DHT record of another shape.")
    key, publisher, subkey, sequence, ttl_s, value, signature = fields
    if any(not isinstance(item, bytes) for item in (key, publisher, subkey, value, signature)):
        raise ProtocolViolation("A peer sent a DHT record of other types.")
    if type(sequence) is not int or type(ttl_s) is not int:
        raise ProtocolViolation("A peer sent a DHT record of other types.")
    if (
        not 0 < len(key) <= limits.KEY_BYTES_MAX
        or len(subkey) > limits.SUBKEY_BYTES_MAX
        or len(value) > limits.VALUE_BYTES_MAX
        or not 0 < ttl_s <= limits.TTL_S_MAX
        or not 0 <= sequence <= limits.SEQUENCE_MAX
        or len(signature) != SIGNATURE_BYTES
    ):
        raise ProtocolViolation("A peer sent a DHT record over a limit.")
    try:
        peer = PeerId.from_bytes(publisher)
    except InvalidAddress as error:
        raise ProtocolViolation("A peer sent a DHT record of nobody.") from error
    if not verify(peer, signature, _signed_bytes(key, publisher, subkey, sequence, ttl_s, value)):
        raise ProtocolViolation("A peer sent a DHT record with a wrong signature.")
    return Record(key, peer, subkey, sequence, ttl_s, value, signature)


def encode_records(records: Iterable[Record]) -> bytes:
    """A msgpack list of encoded records."""
    packed: bytes = msgpack.packb([encode_record(record) for record in records])
    return packed


def decode_records(data: bytes, count_max: int) -> list[Record | None]:
    """Entry by entry: None for each bad one. Raises ProtocolViolation only when the list itself can't be read."""
    try:
        entries = msgpack.unpackb(
            data, max_array_len=count_max, max_map_len=0, max_ext_len=0, max_str_len=0, max_bin_len=len(data)
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolViolation("A peer sent a list of DHT records that can't be read.") from error
    if not isinstance(entries, list):
        raise ProtocolViolation("A peer sent something else than a list of DHT records.")
    return [_decode_or_none(entry) for entry in entries]


def _decode_or_none(entry: object) -> Record | None:
    try:
        return decode_record(entry) if isinstance(entry, bytes) else None
    except ProtocolViolation:
        return None


def merge(into: dict[RecordName, Record], records: Sequence[Record]) -> None:
    """Keep the highest sequence of each name."""
    for record in records:
        held = into.get(record.name)
        if held is None or record.sequence > held.sequence:
            into[record.name] = record
