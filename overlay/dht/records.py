"""Signed records: (key, publisher, subkey, sequence, time to live, value). Pure.

A key holds many, one per (publisher, subkey). The sequence orders one publisher's own versions and nothing else; time to live is
counted by each holder from receipt, since home clocks are wrong. An empty value withdraws. Signed under a domain of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from overlay.dht import limits
from overlay.errors import InvalidAddress, ProtocolViolation
from overlay.identity import Identity, PeerId, verify

DOMAIN = b"peerd-dht-record:1"
SEQUENCE_MAX = 2**63 - 1
SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One version of one publisher's value. ``ttl_s`` is what is left of it as the holder counts."""

    key: bytes
    publisher: PeerId
    subkey: bytes
    sequence: int
    ttl_ms: int
    value: bytes
    signature: bytes
    left_s: float

    @property
    def slot(self) -> tuple[bytes, bytes]:
        """What identifies it within its key."""
        return self.publisher.multihash, self.subkey

    @property
    def is_withdrawal(self) -> bool:
        return not self.value

    @property
    def size_bytes(self) -> int:
        return len(self.value) + len(self.subkey) + 256


def _signed_bytes(key: bytes, publisher: bytes, subkey: bytes, sequence: int, ttl_ms: int, value: bytes) -> bytes:
    """Unambiguous: every variable field is preceded by its length."""
    fields = (key, publisher, subkey, struct.pack(">QQ", sequence, ttl_ms), value)
    return DOMAIN + b"".join(struct.pack(">I", len(field)) + field for field in fields)


def seal_record(identity: Identity, key: bytes, subkey: bytes, sequence: int, ttl_s: float, value: bytes) -> Record:
    """A record of this node. Raises ValueError when it breaks a limit: our own mistake."""
    ttl_ms = int(ttl_s * 1000)
    _check_bounds(key, subkey, sequence, ttl_ms, value)
    publisher = identity.peer_id
    signature = identity.sign(_signed_bytes(key, publisher.multihash, subkey, sequence, ttl_ms, value))
    return Record(key, publisher, subkey, sequence, ttl_ms, value, signature, ttl_ms / 1000)


def _check_bounds(key: bytes, subkey: bytes, sequence: int, ttl_ms: int, value: bytes) -> None:
    if len(key) != limits.KEY_BYTES or len(subkey) > limits.SUBKEY_BYTES_MAX or len(value) > limits.VALUE_BYTES_MAX:
        raise ValueError("a record's key, subkey or value is out of bounds")
    if not 0 <= sequence <= SEQUENCE_MAX or not 0 < ttl_ms <= limits.TTL_S_MAX * 1000:
        raise ValueError("a record's sequence or time to live is out of bounds")


def encode_record(record: Record) -> list[object]:
    """Plain values for msgpack. The last is the time left at this holder, which isn't signed and can only shorten."""
    return [
        record.key,
        record.publisher.multihash,
        record.subkey,
        record.sequence,
        record.ttl_ms,
        record.value,
        record.signature,
        max(0, int(record.left_s * 1000)),
    ]


def decode_record(fields: object) -> Record:
    """Check bounds and signature. Raises ProtocolViolation, whatever came."""
    if not isinstance(fields, list) or len(fields) != 8:
        raise ProtocolViolation("A peer sent a record of the wrong shape.")
    key, publisher, subkey, sequence, ttl_ms, value, signature, left_ms = fields
    if not all(isinstance(field, bytes) for field in (key, publisher, subkey, value, signature)):
        raise ProtocolViolation("A peer sent a record of the wrong shape.")
    if not all(type(field) is int for field in (sequence, ttl_ms, left_ms)):
        raise ProtocolViolation("A peer sent a record of the wrong shape.")
    try:
        _check_bounds(key, subkey, sequence, ttl_ms, value)
        peer = PeerId.from_bytes(publisher)
    except (ValueError, InvalidAddress) as error:
        raise ProtocolViolation(f"A peer sent a record that is out of bounds: {error}.") from error
    if not verify(peer, signature, _signed_bytes(key, publisher, subkey, sequence, ttl_ms, value)):
        raise ProtocolViolation("A peer sent a record with a wrong signature.")
    return Record(key, peer, subkey, sequence, ttl_ms, value, signature, min(max(left_ms, 0), ttl_ms) / 1000)


def merge_records(records: Iterable[Record]) -> tuple[Record, ...]:
    """The newest of each slot, by sequence; of equal ones the one that lives longest. Withdrawals stay: readers drop them."""
    newest: dict[tuple[bytes, bytes], Record] = {}
    for record in records:
        known = newest.get(record.slot)
        if known is None or (record.sequence, record.left_s) > (known.sequence, known.left_s):
            newest[record.slot] = record
    return tuple(newest[slot] for slot in sorted(newest))
