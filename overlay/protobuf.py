"""The few bytes of protobuf that libp2p's control messages need: fields in, fields out. Pure.

Unknown fields are kept and ignored by readers; the last scalar wins; sizes are the caller's to bound.
"""

from __future__ import annotations

from collections.abc import Iterable

from overlay.errors import ProtocolViolation
from overlay.varint import decode_varint, encode_varint

FIELDS_MAX = 1024

Value = int | bytes


def encode_fields(fields: Iterable[tuple[int, Value]]) -> bytes:
    """(number, value) pairs in order; integers as varints, bytes length-delimited."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += encode_varint(number << 3) + encode_varint(value)
        else:
            out += encode_varint(number << 3 | 2) + encode_varint(len(value)) + value
    return bytes(out)


def decode_fields(data: bytes) -> list[tuple[int, Value]]:
    """Every field in order. Raises ProtocolViolation on anything malformed."""
    fields: list[tuple[int, Value]] = []
    offset = 0
    while offset < len(data):
        if len(fields) >= FIELDS_MAX:
            raise ProtocolViolation("A peer sent a message with too many fields.")
        tag, offset = _varint(data, offset)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise ProtocolViolation("A peer sent field number 0.")
        if wire_type == 0:
            value, offset = _varint(data, offset)
            fields.append((number, value))
            continue
        if wire_type == 2:
            length, offset = _varint(data, offset)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ProtocolViolation("A peer sent an unknown wire type.")
        if length > len(data) - offset:
            raise ProtocolViolation("A peer sent a field that ends past its message.")
        fields.append((number, bytes(data[offset : offset + length])))
        offset += length
    return fields


def last_bytes(fields: list[tuple[int, Value]], number: int) -> bytes | None:
    """The last length-delimited field of that number."""
    return next((value for n, value in reversed(fields) if n == number and isinstance(value, bytes)), None)


def last_int(fields: list[tuple[int, Value]], number: int) -> int | None:
    """The last varint field of that number."""
    return next((value for n, value in reversed(fields) if n == number and isinstance(value, int)), None)


def all_bytes(fields: list[tuple[int, Value]], number: int) -> list[bytes]:
    """Every length-delimited field of that number."""
    return [value for n, value in fields if n == number and isinstance(value, bytes)]


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    decoded = decode_varint(data, offset)
    if decoded is None:
        raise ProtocolViolation("A peer sent a message that ends in mid-field.")
    return decoded
