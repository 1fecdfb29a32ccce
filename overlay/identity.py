"""Ed25519 identities, libp2p peer ids, signed envelopes and peer records.

Follows libp2p specs: peer-ids/peer-ids, RFC 0002 (envelopes) and the deployed domain of RFC 0003 (`libp2p-peer-record`).
Draws no randomness of its own: a new identity's seed comes from the caller.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, total_ordering

from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair
from nacl.exceptions import CryptoError

from overlay.errors import InvalidAddress, PeerdError, ProtocolViolation
from overlay.multiaddr import Multiaddr, decode_base58, encode_base58
from overlay.ports import Randomness, Storage
from overlay.protobuf import all_bytes, decode_fields, encode_fields, last_bytes, last_int
from overlay.varint import encode_varint

PUBLIC_KEY_PREFIX = bytes.fromhex("08011220")
PRIVATE_KEY_PREFIX = bytes.fromhex("08011240")
PEER_ID_PREFIX = b"\x00\x24" + PUBLIC_KEY_PREFIX
PEER_ID_BYTES_MAX = 42
SEED_BYTES = 32
SIGNATURE_BYTES = 64
KEYS_CACHED = 8192
RECORDS_CACHED = 256
ENVELOPE_BYTES_MAX = 16384
RECORD_ADDRESSES_MAX = 64
PEER_RECORD_DOMAIN = b"libp2p-peer-record"
PEER_RECORD_TYPE = b"\x03\x01"
IDENTITY_FILE = "identity.key"


class BadIdentity(PeerdError):
    """The identity file is not a key."""

    code = "bad-identity"
    exit_code = 11


@total_ordering
@dataclass(frozen=True, slots=True)
class PeerId:
    """A libp2p peer id: the multihash bytes, compared and ordered as bytes."""

    multihash: bytes

    @classmethod
    def of_public_key(cls, public_key: bytes) -> PeerId:
        """From 32 raw Ed25519 bytes."""
        if len(public_key) != 32:
            raise InvalidAddress("An Ed25519 public key has 32 bytes.")
        return _peer_of(PEER_ID_PREFIX + public_key)

    @classmethod
    def from_bytes(cls, multihash: bytes) -> PeerId:
        """From the raw multihash; raises InvalidAddress for other key types than Ed25519."""
        return _peer_of(bytes(multihash))

    @classmethod
    def from_text(cls, text: str) -> PeerId:
        """From base58 (``12D3KooW...``) or CIDv1 text (``bafz...``)."""
        try:
            if text.startswith("b") and len(text) > 52:
                padded = text[1:].upper() + "=" * (-len(text[1:]) % 8)
                data = base64.b32decode(padded)
                if data[:2] != b"\x01\x72":
                    raise InvalidAddress(f"{text[:60]!r} is no libp2p key")
                return cls.from_bytes(data[2:])
            return cls.from_bytes(decode_base58(text))
        except ValueError as error:
            raise InvalidAddress(f"{text[:60]!r} is no peer id") from error

    @property
    def public_key(self) -> bytes:
        """32 raw Ed25519 bytes: an id of this kind carries its key."""
        return self.multihash[len(PEER_ID_PREFIX) :]

    @property
    def short(self) -> str:
        """The last six characters, for logs."""
        return str(self)[-6:]

    def __bytes__(self) -> bytes:
        return self.multihash

    def __hash__(self) -> int:
        return hash(self.multihash)

    def __lt__(self, other: object) -> bool:
        return self.multihash < other.multihash if isinstance(other, PeerId) else NotImplemented

    def __str__(self) -> str:
        return _base58_of(self.multihash)

    def __repr__(self) -> str:
        return f"PeerId({self})"


@lru_cache(maxsize=KEYS_CACHED)
def _peer_of(multihash: bytes) -> PeerId:
    if len(multihash) != len(PEER_ID_PREFIX) + 32 or not multihash.startswith(PEER_ID_PREFIX):
        raise InvalidAddress("only Ed25519 peer ids (12D3KooW...) are used here")
    return PeerId(multihash)


@lru_cache(maxsize=KEYS_CACHED)
def _base58_of(multihash: bytes) -> str:
    return encode_base58(multihash)


def verify(peer: PeerId, signature: bytes, data: bytes) -> bool:
    """Whether ``peer`` signed ``data``. By libsodium, which takes half of OpenSSL's time: every token waits for this at every hop."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + data, peer.public_key)
    except (CryptoError, ValueError):
        return False
    return True


class Identity:
    """This node's Ed25519 key."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self.public_key, self._secret_key = crypto_sign_seed_keypair(seed)
        self.peer_id = PeerId.of_public_key(self.public_key)

    @classmethod
    def load_or_create(cls, storage: Storage, randomness: Randomness) -> Identity:
        """The identity kept in the state directory, made at the first start (mode 0600 is the storage's)."""
        saved = storage.load(IDENTITY_FILE)
        if saved is None:
            identity = cls(randomness.token(SEED_BYTES))
            storage.save(IDENTITY_FILE, PRIVATE_KEY_PREFIX + identity._seed + identity.public_key)
            return identity
        seed = saved[len(PRIVATE_KEY_PREFIX) : len(PRIVATE_KEY_PREFIX) + SEED_BYTES]
        if not saved.startswith(PRIVATE_KEY_PREFIX) or len(saved) not in (68, 100):
            raise BadIdentity(
                f"The state directory's {IDENTITY_FILE} is damaged; restore it, or delete it for a new identity."
            )
        identity = cls(seed)
        if saved[36:68] != identity.public_key or saved[68:] not in (b"", identity.public_key):
            raise BadIdentity(
                f"The state directory's {IDENTITY_FILE} is damaged; restore it, or delete it for a new identity."
            )
        return identity

    def sign(self, data: bytes) -> bytes:
        """64 bytes. Never called on bare bytes of a peer's choosing: callers prefix a domain."""
        return crypto_sign(data, self._secret_key)[:SIGNATURE_BYTES]


def encode_public_key(peer: PeerId) -> bytes:
    """The PublicKey protobuf (36 bytes)."""
    return PUBLIC_KEY_PREFIX + peer.public_key


def decode_public_key(data: bytes) -> PeerId:
    """The peer of a PublicKey protobuf; raises ProtocolViolation."""
    if len(data) != 36 or not data.startswith(PUBLIC_KEY_PREFIX):
        raise ProtocolViolation("A peer showed a public key that is not Ed25519.")
    return PeerId.of_public_key(data[4:])


def _envelope_bytes(domain: bytes, payload_type: bytes, payload: bytes) -> bytes:
    return b"".join(encode_varint(len(field)) + field for field in (domain, payload_type, payload))


def seal_envelope(identity: Identity, domain: bytes, payload_type: bytes, payload: bytes) -> bytes:
    """A signed envelope (libp2p RFC 0002)."""
    signature = identity.sign(_envelope_bytes(domain, payload_type, payload))
    key = encode_public_key(identity.peer_id)
    return encode_fields(((1, key), (2, payload_type), (3, payload), (5, signature)))


def open_envelope(data: bytes, domain: bytes, payload_type: bytes) -> tuple[PeerId, bytes]:
    """(signer, payload) after verification; raises ProtocolViolation."""
    if len(data) > ENVELOPE_BYTES_MAX:
        raise ProtocolViolation("A peer sent an envelope that is too large.")
    fields = decode_fields(data)
    key, kind, payload, signature = (last_bytes(fields, number) for number in (1, 2, 3, 5))
    if key is None or kind != payload_type or payload is None or signature is None:
        raise ProtocolViolation("A peer sent an incomplete envelope.")
    signer = decode_public_key(key)
    if not verify(signer, signature, _envelope_bytes(domain, payload_type, payload)):
        raise ProtocolViolation("A peer sent an envelope with a wrong signature.")
    return signer, payload


def seal_peer_record(identity: Identity, sequence: int, addresses: Sequence[Multiaddr]) -> bytes:
    """A signed peer record with this node's addresses."""
    entries = [(3, encode_fields(((1, address.encode()),))) for address in addresses]
    payload = encode_fields(((1, identity.peer_id.multihash), (2, sequence), *entries))
    return seal_envelope(identity, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE, payload)


@lru_cache(maxsize=RECORDS_CACHED)
def open_peer_record(data: bytes) -> tuple[PeerId, int, tuple[Multiaddr, ...]]:
    """(peer, sequence, addresses); addresses of unknown protocols are left out. Raises ProtocolViolation."""
    signer, payload = open_envelope(data, PEER_RECORD_DOMAIN, PEER_RECORD_TYPE)
    fields = decode_fields(payload)
    if last_bytes(fields, 1) != signer.multihash:
        raise ProtocolViolation("A peer sent a peer record of somebody else.")
    addresses = []
    for entry in all_bytes(fields, 3)[:RECORD_ADDRESSES_MAX]:
        raw = last_bytes(decode_fields(entry), 1)
        address = None if raw is None else decode_address_or_none(raw)
        if address is not None:
            addresses.append(address)
    return signer, last_int(fields, 2) or 0, tuple(addresses)


def decode_address_or_none(raw: bytes) -> Multiaddr | None:
    """An address, or None when it is of no use here."""
    try:
        return Multiaddr.decode(raw)
    except ProtocolViolation:
        return None
