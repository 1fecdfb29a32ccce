"""Connections and signatures of the real sizes without the arithmetic, for runs of thousands of hosts.

The handshake has Noise's messages, lengths and round trips and tells each side who the other is; sealed messages are the plaintext
and a tag of zeros. Signatures are keyed BLAKE2b under a secret of the simulated world: a peer in it can't forge one any more than a
real one, since nothing that runs in it knows the secret. Nothing of this is reachable from the daemon: the host takes its
handshake as an argument, and `cheap_signatures` changes the identity module from outside, for as long as it lasts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nacl.exceptions import CryptoError

from overlay import identity as identities
from overlay.errors import ProtocolViolation, UpgradeError
from overlay.host import Meeting
from overlay.identity import SIGNATURE_BYTES, PeerId, encode_public_key
from overlay.noise.handshake import DH_BYTES, HandshakeResult
from overlay.noise.transport import TAG_BYTES, CipherState
from overlay.ports import Randomness
from overlay.protobuf import encode_fields
from overlay.upgrade import YAMUX

WORLD_SECRET = b"known to the world, to nobody in it"
NO_TAG = bytes(TAG_BYTES)
KEY_BYTES = 32
PAYLOAD_BYTES = len(
    encode_fields(((1, bytes(36)), (2, bytes(SIGNATURE_BYTES)), (4, encode_fields(((2, YAMUX.encode()),)))))
)
"""Of the payload that proves an identity: key, signature and the multiplexer."""
HELLO_BYTES = DH_BYTES
ANSWER_BYTES = DH_BYTES + DH_BYTES + TAG_BYTES + PAYLOAD_BYTES + TAG_BYTES
FINAL_BYTES = DH_BYTES + TAG_BYTES + PAYLOAD_BYTES + TAG_BYTES
PUBLIC_KEY_BYTES = 36
NETWORK_BYTES = 8


class NullCipher(CipherState):
    """`overlay.noise.transport.CipherState` that hides nothing: the plaintext, and a tag of zeros."""

    __slots__ = ()

    def __init__(self) -> None:
        """It has no key and counts nothing."""

    def seal(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        return bytes(plaintext) + NO_TAG

    def seal_framed(self, plaintext: bytes | bytearray | memoryview) -> bytearray:
        return self.seal_framed_each((plaintext,))

    def seal_framed_each(self, plaintexts: Sequence[bytes | bytearray | memoryview]) -> bytearray:
        out = bytearray()
        for plaintext in plaintexts:
            out += (len(plaintext) + TAG_BYTES).to_bytes(2, "big")
            out += plaintext
            out += NO_TAG
        return out

    def open_into(self, sealed: bytes | bytearray | memoryview, buffer: memoryview) -> memoryview:
        return memoryview(sealed)[: self._opened(sealed)]

    def open(self, sealed: bytes | bytearray | memoryview) -> bytes:
        return bytes(sealed[: self._opened(sealed)])

    def _opened(self, sealed: bytes | bytearray | memoryview) -> int:
        size = len(sealed) - TAG_BYTES
        if size < 0 or bytes(sealed[size:]) != NO_TAG:
            raise ProtocolViolation("A message from a peer was altered on the way; the connection is closed.")
        return size


class NullHandshake:
    """One side of three messages as long as Noise XX's; see `overlay.upgrade.Securing`."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._network = hashlib.blake2b(meeting.prologue, digest_size=NETWORK_BYTES).digest()
        self._step = 0
        self._remote: PeerId | None = None
        self.result: HandshakeResult | None = None

    @property
    def wants_to_write(self) -> bool:
        return self.result is None and (self._step % 2 == 0) == self._meeting.initiator

    def write(self) -> bytes:
        step, self._step = self._step, self._step + 1
        if step == 0:
            return self._network.ljust(HELLO_BYTES, b"\0")
        message = self._network + encode_public_key(self._meeting.identity.peer_id)
        if step == 2:
            self._finish()
        return message.ljust(ANSWER_BYTES if step == 1 else FINAL_BYTES, b"\0")

    def read(self, message: bytes) -> None:
        step, self._step = self._step, self._step + 1
        if len(message) != (HELLO_BYTES, ANSWER_BYTES, FINAL_BYTES)[min(step, 2)]:
            raise UpgradeError("The other side sent a handshake message of a wrong length.")
        if message[:NETWORK_BYTES] != self._network:
            raise UpgradeError("The other side failed the handshake: it is in another network.")
        if step == 0:
            return
        self._meet(message[NETWORK_BYTES : NETWORK_BYTES + PUBLIC_KEY_BYTES])
        if step == 2:
            self._finish()

    def _meet(self, public_key: bytes) -> None:
        try:
            peer = identities.decode_public_key(public_key)
        except ProtocolViolation as error:
            raise UpgradeError(f"The handshake was refused: {error}") from error
        expected = self._meeting.expected_peer
        if expected is not None and peer != expected:
            raise UpgradeError(f"Dialled {expected} but {peer} answered; the address belongs to somebody else now.")
        if peer == self._meeting.identity.peer_id:
            raise UpgradeError("Dialled this node's own address.")
        self._remote = peer

    def _finish(self) -> None:
        assert self._remote is not None
        self.result = HandshakeResult(self._remote, (YAMUX,), b"", NullCipher(), NullCipher())


def null_channel(meeting: Meeting, randomness: Randomness) -> NullHandshake:
    """`overlay.host.Secure` without cryptography. Draws nothing."""
    return NullHandshake(meeting)


def _signature(public_key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=WORLD_SECRET, person=public_key[:16], digest_size=SIGNATURE_BYTES).digest()


def _sign(data: bytes, secret_key: bytes) -> bytes:
    return _signature(secret_key[KEY_BYTES:], data) + data


def _open(signed: bytes, public_key: bytes) -> bytes:
    data = signed[SIGNATURE_BYTES:]
    if signed[:SIGNATURE_BYTES] != _signature(public_key, data):
        raise CryptoError("not that key's signature")
    return data


def _key_pair(seed: bytes) -> tuple[bytes, bytes]:
    public_key = hashlib.blake2b(seed, digest_size=KEY_BYTES, person=b"key").digest()
    return public_key, seed + public_key


@contextmanager
def cheap_signatures() -> Iterator[None]:
    """Inside, identities sign by keyed hash: 64 bytes as ever, at a twentieth of the time. Peer ids of equal seeds differ from outside."""
    names = vars(identities)
    cheap = {"crypto_sign": _sign, "crypto_sign_open": _open, "crypto_sign_seed_keypair": _key_pair}
    before = {name: names[name] for name in cheap}
    names.update(cheap)
    try:
        yield
    finally:
        names.update(before)
