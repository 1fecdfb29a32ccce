"""Unsigned varints (multiformats unsigned-varint): little-endian base 128, minimal, at most 9 bytes. Pure."""

from __future__ import annotations

from overlay.errors import ProtocolViolation

VARINT_BYTES_MAX = 9
_ONE_BYTE = tuple(bytes((value,)) for value in range(0x80))


def encode_varint(value: int) -> bytes:
    """``value`` in 0..2^63-1."""
    if 0 <= value < 0x80:
        return _ONE_BYTE[value]
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{value} is no 63-bit unsigned integer")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """(value, offset after it), or None while bytes are missing. Raises ProtocolViolation on a bad encoding."""
    if offset < len(data) and data[offset] < 0x80:
        return data[offset], offset + 1
    value = 0
    for index in range(VARINT_BYTES_MAX):
        if offset + index >= len(data):
            return None
        byte = data[offset + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if byte == 0 and index > 0:
                raise ProtocolViolation("A peer sent a varint that is not minimal.")
            return value, offset + index + 1
    raise ProtocolViolation("A peer sent a varint longer than 9 bytes.")
