"""What a message's signature covers: a domain, the header as sent, the parts as decoded. Pure.

Never the stream, the sequence number or the codec: a message may be forwarded or recompressed and stays valid.
"""

from __future__ import annotations

import hashlib

from overlay.errors import InvalidAddress
from overlay.identity import Identity, PeerId, verify
from overlay.rpc.types import Message, Part, digest_of

DOMAIN = b"peerd-message:1"


def signed_bytes(header: bytes, parts_digest: bytes) -> bytes:
    """79 bytes that stand for a message."""
    return DOMAIN + hashlib.sha256(header).digest() + parts_digest


def sign(identity: Identity, header: bytes, parts: tuple[Part, ...], parts_digest: bytes | None = None) -> bytes:
    """64 bytes by ``identity``; ``parts_digest`` is `digest_of` the parts, where it is known."""
    return identity.sign(signed_bytes(header, parts_digest or digest_of(parts)))


def is_authentic(message: Message) -> bool:
    """Whether the message's sender signed it."""
    if message.header_bytes is None or message.signature is None:
        return False
    try:
        sender = PeerId.from_bytes(message.sender)
    except InvalidAddress:
        return False
    parts_digest = message.parts_digest or digest_of(message.parts)
    return verify(sender, message.signature, signed_bytes(message.header_bytes, parts_digest))
