"""Identify and identify/push messages (libp2p specs: identify/README). Pure.

Read to FIN: several messages merge, repeated fields append, scalars override. The list of protocols doubles as capability bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overlay import limits
from overlay.errors import ProtocolViolation
from overlay.identity import (
    Identity,
    PeerId,
    decode_address_or_none,
    decode_public_key,
    encode_public_key,
    open_peer_record,
    seal_peer_record,
)
from overlay.multiaddr import Multiaddr
from overlay.protobuf import all_bytes, decode_fields, encode_fields, last_bytes
from overlay.varint import decode_varint, encode_varint

IDENTIFY = "/ipfs/id/1.0.0"
IDENTIFY_PUSH = "/ipfs/id/push/1.0.0"
PROTOCOL_VERSION = b"peerd/1"


@dataclass(frozen=True, slots=True)
class Identified:
    """What a peer says of itself, and how it sees us."""

    addresses: tuple[Multiaddr, ...]
    protocols: tuple[str, ...]
    observed_address: Multiaddr | None
    agent: str
    record_sequence: int


def encode_identify(
    identity: Identity,
    addresses: Sequence[Multiaddr],
    protocols: Sequence[str],
    observed: Multiaddr | None,
    agent: str,
    record_sequence: int,
) -> bytes:
    """One length-prefixed message."""
    return message_with(encode_own(identity, addresses, protocols, agent, record_sequence), observed)


def encode_own(
    identity: Identity, addresses: Sequence[Multiaddr], protocols: Sequence[str], agent: str, record_sequence: int
) -> bytes:
    """The fields that are the same for everybody who asks."""
    bare = [address.without_peer() for address in addresses]
    fields: list[tuple[int, int | bytes]] = [
        (5, PROTOCOL_VERSION),
        (6, agent.encode()),
        (1, encode_public_key(identity.peer_id)),
        *((2, address.encode()) for address in bare),
        *((3, protocol.encode()) for protocol in protocols),
        (8, seal_peer_record(identity, record_sequence, bare)),
    ]
    return encode_fields(fields)


def message_with(own: bytes, observed: Multiaddr | None) -> bytes:
    """One length-prefixed message of `encode_own`'s fields for whoever is seen at ``observed``."""
    body = own if observed is None else own + encode_fields(((4, observed.encode()),))
    return encode_varint(len(body)) + body


def decode_identify(data: bytes, peer: PeerId) -> Identified:
    """All that came before FIN. Raises ProtocolViolation, also when the key is another peer's."""
    merged = b""
    offset = 0
    for _ in range(limits.IDENTIFY_MESSAGES_MAX):
        if offset == len(data):
            break
        decoded = decode_varint(data, offset)
        if decoded is None or decoded[0] > limits.IDENTIFY_BYTES_MAX or decoded[0] > len(data) - decoded[1]:
            raise ProtocolViolation("A peer sent a broken identify message.")
        merged += data[decoded[1] : decoded[1] + decoded[0]]
        offset = decoded[1] + decoded[0]
    fields = decode_fields(merged)
    key = last_bytes(fields, 1)
    if key is not None and decode_public_key(key) != peer:
        raise ProtocolViolation("A peer identified itself with another peer's key.")
    sequence = 0
    addresses = tuple(filter(None, map(decode_address_or_none, all_bytes(fields, 2)[: limits.ADDRESSES_PER_PEER])))
    record = last_bytes(fields, 8)
    if record is not None:
        signer, sequence, certified = open_peer_record(record)
        if signer != peer:
            raise ProtocolViolation("A peer showed a peer record of somebody else.")
        addresses = certified[: limits.ADDRESSES_PER_PEER]
    usable = tuple(bare for address in addresses if (bare := without_own_suffix(address, peer)) is not None)
    names = all_bytes(fields, 3)[: limits.PROTOCOLS_PER_PEER]
    observed = last_bytes(fields, 4)
    return Identified(
        usable,
        tuple(name.decode(errors="replace") for name in names),
        None if observed is None else decode_address_or_none(observed),
        (last_bytes(fields, 6) or b"").decode(errors="replace")[:128],
        sequence,
    )


def without_own_suffix(address: Multiaddr, peer: PeerId) -> Multiaddr | None:
    """The address without ``/p2p/PEER``; None when it names somebody else."""
    named = address.get("p2p")
    if named is not None and "p2p-circuit" not in dict(address.parts) and named != str(peer):
        return None
    return address.without_peer()
