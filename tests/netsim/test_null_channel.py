"""The channel without cryptography says on the wire as much as Noise does, and still tells peers apart."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from netsim.null_channel import NullCipher, NullHandshake, cheap_signatures
from overlay.errors import ProtocolViolation, UpgradeError
from overlay.host import Meeting
from overlay.identity import Identity, PeerId, verify
from overlay.noise.handshake import Handshake
from overlay.upgrade import YAMUX, Securing, Upgrade

ONE, TWO, THREE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))


def null(identity: Identity, *, initiator: bool, expected: PeerId | None = None, prologue: bytes = b"") -> Securing:
    return NullHandshake(Meeting(identity, initiator, expected, prologue))


def noise(identity: Identity, *, initiator: bool) -> Securing:
    keys = [X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (7, 8)]
    return Handshake(identity, keys[0], keys[1], initiator=initiator, muxers=(YAMUX,))


def upgraded(dialler: Securing, acceptor: Securing) -> list[int]:
    """The sizes of what went over the wire, in order."""
    one, two = Upgrade(dialler, initiator=True), Upgrade(acceptor, initiator=False)
    sizes, message, turn = [], one.start(), 0
    while message:
        sizes.append(len(message))
        message = (two, one)[turn % 2].receive(memoryview(message))
        turn += 1
    assert one.is_done and two.is_done
    assert one.result is not None and two.result is not None
    assert (one.result.remote_peer, two.result.remote_peer) == (TWO.peer_id, ONE.peer_id)
    return sizes


def test_the_handshake_has_the_sizes_and_the_round_trips_of_noise() -> None:
    real = upgraded(noise(ONE, initiator=True), noise(TWO, initiator=False))
    assert upgraded(null(ONE, initiator=True), null(TWO, initiator=False)) == real


def test_another_peer_another_network_and_oneself_are_refused() -> None:
    with pytest.raises(UpgradeError, match="somebody else"):
        upgraded(null(ONE, initiator=True, expected=THREE.peer_id), null(TWO, initiator=False))
    with pytest.raises(UpgradeError, match="another network"):
        upgraded(null(ONE, initiator=True, prologue=b"ours"), null(TWO, initiator=False))
    with pytest.raises(UpgradeError, match="own address"):
        upgraded(null(ONE, initiator=True), null(ONE, initiator=False))


def test_sealed_messages_are_as_long_as_noise_makes_them_and_altered_ones_are_refused() -> None:
    cipher = NullCipher()
    sealed = cipher.seal_framed_each((b"abc", b"", b"x" * 1000))
    assert len(sealed) == sum(2 + 16 + size for size in (3, 0, 1000))
    assert bytes(cipher.open_into(sealed[2:21], memoryview(bytearray(100)))) == b"abc"
    assert cipher.open(cipher.seal(b"abc")) == b"abc"
    for altered in (b"abc", cipher.seal(b"abc")[:-1] + b"\x01"):
        with pytest.raises(ProtocolViolation):
            cipher.open(altered)


def test_cheap_signatures_belong_to_a_key_and_to_the_data_and_last_no_longer_than_asked() -> None:
    with cheap_signatures():
        one, two = Identity(bytes(32)), Identity(bytes([9]) * 32)
        signature = one.sign(b"data")
        assert len(signature) == 64
        assert verify(one.peer_id, signature, b"data")
        assert not verify(two.peer_id, signature, b"data")
        assert not verify(one.peer_id, signature, b"date")
    assert not verify(one.peer_id, signature, b"data")
    real = Identity(bytes(32))
    assert verify(real.peer_id, real.sign(b"data"), b"data")
