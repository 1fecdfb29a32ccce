"""Lossless codecs for parts: raw, and byte planes with zstd level 1. Pure.

Floats compress badly as they lie and well with their bytes sorted by significance (facts: 16-bit activations 1.4x at
about 0.75 GB/s). Which codec pays depends on the link; the choice is here, the measurement is the caller's.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import zstandard

from overlay.errors import ProtocolViolation
from overlay.rpc.types import DTYPE_BYTES, Part

LEVEL = 1
COMPRESS_BYTES_PER_S = 0.7e9
"""Measured: split and zstd-1 of 16-bit floats on one core."""
EXPECTED_RATIO = 1.35
WORTH_SHARE = 0.8
"""Compress when the part then arrives within this share of its raw time: a measured uplink is only roughly one."""
SMALL_BYTES = 4096


class Codec(IntEnum):
    """How a part's bytes travel."""

    RAW = 0
    PLANES_ZSTD = 1


def choose_codec(part: Part, link_bytes_per_s: float | None) -> Codec:
    """Compression only where the link is slow enough for the bytes saved to cost more than the work."""
    if link_bytes_per_s is None or part.size_bytes < SMALL_BYTES or DTYPE_BYTES[part.dtype] not in (2, 4):
        return Codec.RAW
    raw_s = part.size_bytes / link_bytes_per_s
    packed_s = raw_s / EXPECTED_RATIO + part.size_bytes / COMPRESS_BYTES_PER_S
    return Codec.PLANES_ZSTD if packed_s < WORTH_SHARE * raw_s else Codec.RAW


def encode_part(part: Part, codec: Codec) -> bytes | bytearray | memoryview:
    """The bytes that travel."""
    if codec is Codec.RAW:
        return part.data
    width = DTYPE_BYTES[part.dtype]
    planes = np.ascontiguousarray(np.frombuffer(part.data, np.uint8).reshape(-1, width).T)
    return zstandard.ZstdCompressor(level=LEVEL).compress(planes.data)


def decode_planes(encoded: bytes | bytearray, width: int, decoded_bytes: int) -> bytearray:
    """Undo `encode_part`; never makes more than ``decoded_bytes``. Raises ProtocolViolation."""
    try:
        if zstandard.frame_content_size(bytes(encoded[:32])) != decoded_bytes:
            raise ProtocolViolation("A peer sent a compressed tensor of another size than it said.")
        planes = zstandard.ZstdDecompressor().decompress(encoded, max_output_size=decoded_bytes)
    except zstandard.ZstdError as error:
        raise ProtocolViolation("A peer sent a compressed tensor that can't be read.") from error
    if len(planes) != decoded_bytes or width <= 0 or decoded_bytes % width:
        raise ProtocolViolation("A peer sent a compressed tensor of another size than it said.")
    decoded = bytearray(decoded_bytes)
    np.frombuffer(decoded, np.uint8).reshape(-1, width)[:] = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    return decoded
