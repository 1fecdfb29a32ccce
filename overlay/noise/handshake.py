"""Noise_XX_25519_ChaChaPoly_SHA256 with libp2p's signed payload, as a machine over whole handshake messages.

Owns the symmetric state and the proof that the static key belongs to the peer id. Ephemeral and static X25519 keys
are handed in, so that vectors and simulations can fix them. Raises only UpgradeError on remote input.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from overlay.errors import ProtocolViolation, UpgradeError
from overlay.identity import Identity, PeerId, decode_public_key, encode_public_key, verify
from overlay.noise.transport import CipherState
from overlay.protobuf import all_bytes, decode_fields, encode_fields, last_bytes

PROTOCOL_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
SIGNATURE_PREFIX = b"noise-libp2p-static-key:"
HANDSHAKE_MESSAGE_BYTES_MAX = 4096
DH_BYTES = 32
TAG_BYTES = 16
MUXERS_MAX = 16


@dataclass(frozen=True, slots=True)
class HandshakeResult:
    """What a finished handshake proves and gives."""

    remote_peer: PeerId
    remote_muxers: tuple[str, ...]
    handshake_hash: bytes
    sender: CipherState
    receiver: CipherState


class _Symmetric:
    """Noise's SymmetricState, section 5.2 of the Noise specification."""

    def __init__(self, prologue: bytes) -> None:
        self.hash = PROTOCOL_NAME
        self.chaining_key = PROTOCOL_NAME
        self._key: bytes | None = None
        self._nonce = 0
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self.chaining_key, self._key = _hkdf(self.chaining_key, material)
        self._nonce = 0

    def encrypt(self, plaintext: bytes) -> bytes:
        sealed = plaintext
        if self._key is not None:
            sealed = ChaCha20Poly1305(self._key).encrypt(self._next_nonce(), plaintext, self.hash)
        self.mix_hash(sealed)
        return sealed

    def decrypt(self, sealed: bytes) -> bytes:
        plaintext = sealed
        if self._key is not None:
            try:
                plaintext = ChaCha20Poly1305(self._key).decrypt(self._next_nonce(), sealed, self.hash)
            except InvalidTag as error:
                raise UpgradeError(
                    "The other side failed the handshake: it is in another network, or something alters the traffic."
                ) from error
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        return _hkdf(self.chaining_key, b"")

    def _next_nonce(self) -> bytes:
        nonce = b"\0\0\0\0" + self._nonce.to_bytes(8, "little")
        self._nonce += 1
        return nonce


def _hkdf(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    temporary = hmac.digest(chaining_key, material, "sha256")
    first = hmac.digest(temporary, b"\x01", "sha256")
    return first, hmac.digest(temporary, first + b"\x02", "sha256")


class Handshake:
    """One side of XX: call `write` and `read` in turn until `result` is set.

    The initiator writes 1, reads 2, writes 3; the responder reads 1, writes 2, reads 3.
    """

    def __init__(
        self,
        identity: Identity,
        static_key: X25519PrivateKey,
        ephemeral_key: X25519PrivateKey,
        *,
        initiator: bool,
        expected_peer: PeerId | None = None,
        muxers: tuple[str, ...] = (),
        prologue: bytes = b"",
    ) -> None:
        self._identity = identity
        self._static = static_key
        self._ephemeral = ephemeral_key
        self._initiator = initiator
        self._expected_peer = expected_peer
        self._muxers = muxers
        self._symmetric = _Symmetric(prologue)
        self._step = 0
        self._remote_ephemeral = b""
        self._remote_static = b""
        self._remote: tuple[PeerId, tuple[str, ...]] | None = None
        self.result: HandshakeResult | None = None

    @property
    def wants_to_write(self) -> bool:
        """Whether the next move is ours."""
        return self.result is None and (self._step % 2 == 0) == self._initiator

    def write(self) -> bytes:
        """The next handshake message of ours."""
        step, state = self._step, self._symmetric
        self._step += 1
        if step == 0:
            public = _public_bytes(self._ephemeral)
            state.mix_hash(public)
            return public + state.encrypt(b"")
        if step == 1:
            public = _public_bytes(self._ephemeral)
            state.mix_hash(public)
            state.mix_key(_exchange(self._ephemeral, self._remote_ephemeral))
            message = public + state.encrypt(_public_bytes(self._static))
            state.mix_key(_exchange(self._static, self._remote_ephemeral))
            return message + state.encrypt(self._payload())
        message = state.encrypt(_public_bytes(self._static))
        state.mix_key(_exchange(self._static, self._remote_ephemeral))
        message += state.encrypt(self._payload())
        self._finish()
        return message

    def read(self, message: bytes) -> None:
        """Take the peer's next message. Raises UpgradeError."""
        step, state = self._step, self._symmetric
        self._step += 1
        if step in (0, 1):
            if len(message) < DH_BYTES:
                raise UpgradeError("The other side sent a handshake message that is too short.")
            self._remote_ephemeral = message[:DH_BYTES]
            state.mix_hash(self._remote_ephemeral)
            message = message[DH_BYTES:]
        if step == 0:
            state.decrypt(message)
            return
        if step == 1:
            state.mix_key(_exchange(self._ephemeral, self._remote_ephemeral))
        self._remote_static = state.decrypt(message[: DH_BYTES + TAG_BYTES])
        state.mix_key(_exchange(self._ephemeral, self._remote_static))
        self._accept_payload(state.decrypt(message[DH_BYTES + TAG_BYTES :]))
        if step == 2:
            self._finish()

    def _payload(self) -> bytes:
        signature = self._identity.sign(SIGNATURE_PREFIX + _public_bytes(self._static))
        extensions = encode_fields((2, muxer.encode()) for muxer in self._muxers)
        fields: list[tuple[int, int | bytes]] = [(1, encode_public_key(self._identity.peer_id)), (2, signature)]
        if self._muxers:
            fields.append((4, extensions))
        return encode_fields(fields)

    def _accept_payload(self, payload: bytes) -> None:
        try:
            fields = decode_fields(payload)
            key, signature = last_bytes(fields, 1), last_bytes(fields, 2)
            if key is None or signature is None:
                raise ProtocolViolation("A peer sent no proof of its identity.")
            peer = decode_public_key(key)
            extensions = decode_fields(last_bytes(fields, 4) or b"")
        except ProtocolViolation as error:
            raise UpgradeError(f"The handshake was refused: {error}") from error
        if not verify(peer, signature, SIGNATURE_PREFIX + self._remote_static):
            raise UpgradeError("The other side's proof of identity is wrong; refusing it.")
        if self._expected_peer is not None and peer != self._expected_peer:
            raise UpgradeError(
                f"Dialled {self._expected_peer} but {peer} answered; the address belongs to somebody else now."
            )
        if peer == self._identity.peer_id:
            raise UpgradeError("Dialled this node's own address.")
        muxers = tuple(raw.decode(errors="replace") for raw in all_bytes(extensions, 2)[:MUXERS_MAX])
        self._remote = (peer, muxers)

    def _finish(self) -> None:
        assert self._remote is not None
        first, second = self._symmetric.split()
        mine, theirs = (first, second) if self._initiator else (second, first)
        peer, muxers = self._remote
        self.result = HandshakeResult(peer, muxers, self._symmetric.hash, CipherState(mine), CipherState(theirs))


def _public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _exchange(key: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise UpgradeError("The other side sent a bad key in the handshake.") from error
