"""Messages as values: a kind, a msgpack-able header and raw tensor parts.

The layer above (``blocks.protocol``) builds and reads these; ``overlay.rpc`` frames, signs and carries them.
Knows nothing of models: a part is a named, shaped, typed run of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor outside msgpack: little-endian, contiguous, row-major.

    ``data`` is any C-contiguous buffer of exactly ``size_bytes`` bytes; it is never mutated after a part was made
    (senders may still be transmitting it).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview = field(repr=False)
    digest: bytes | None = field(default=None, repr=False, compare=False)
    """SHA-256 of ``data`` where it is known already: of parts that were received, hashed as they came."""

    @property
    def size_bytes(self) -> int:
        count = DTYPE_BYTES[self.dtype]
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Message:
    """One application message.

    ``header`` holds only what msgpack can carry (None, bool, int, float, str, bytes, list, dict with str keys).
    ``sender`` and ``recipient`` are raw peer-id bytes: signed, and checked by the receiver. A message that never
    left the process has ``header_bytes`` and ``signature`` None.
    """

    kind: str
    header: Mapping[str, Any]
    parts: tuple[Part, ...] = ()
    sender: bytes = b""
    recipient: bytes = b""
    header_bytes: bytes | None = field(default=None, repr=False)
    signature: bytes | None = field(default=None, repr=False)
    parts_digest: bytes | None = field(default=None, repr=False, compare=False)
    """SHA-256 of the parts' bytes in order, where this process has computed it already; it is never taken from a peer."""


def digest_of(parts: tuple[Part, ...]) -> bytes:
    """SHA-256 over the parts' bytes in order; of a single part that's the part's own, which is hashed once."""
    if len(parts) == 1 and parts[0].digest is not None:
        return parts[0].digest
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.digest()
