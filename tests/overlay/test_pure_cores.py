"""Varints, protobuf fields, multistream, Noise and identify: vectors, any cut of bytes, and garbage."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.errors import PeerdError, ProtocolRefused, ProtocolViolation, UpgradeError
from overlay.identify import decode_identify, encode_identify
from overlay.multiaddr import Multiaddr
from overlay.multistream import Initiator, Responder, proposal
from overlay.noise.handshake import Handshake
from overlay.noise.transport import CipherState, FrameSplitter
from overlay.protobuf import decode_fields, encode_fields
from overlay.upgrade import YAMUX, Upgrade
from overlay.varint import decode_varint, encode_varint
from tests.overlay.network import identity

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def cuts(data: bytes, points: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def key(byte: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes([byte]) * 32)


def handshakes(prologue: bytes = b"", muxers: tuple[str, ...] = (YAMUX,)) -> tuple[Handshake, Handshake]:
    dialler = Handshake(identity(1), key(0x12), key(0x11), initiator=True, muxers=muxers, prologue=prologue)
    listener = Handshake(identity(2), key(0x22), key(0x21), initiator=False, muxers=muxers)
    return dialler, listener


@given(st.integers(0, 2**63 - 1))
def test_varints_survive(value: int) -> None:
    assert decode_varint(encode_varint(value)) == (value, len(encode_varint(value)))


@pytest.mark.parametrize("data", [b"\x80\x00", b"\xff" * 10, b"\x80" * 9])
def test_varints_that_are_not_minimal_or_too_long_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_varint(data)


@given(st.lists(st.tuples(st.integers(1, 1000), st.one_of(st.integers(0, 2**40), st.binary(max_size=50)))))
def test_protobuf_fields_survive(fields: list[tuple[int, int | bytes]]) -> None:
    assert decode_fields(encode_fields(fields)) == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_refused(data: bytes) -> None:
    try:
        decode_fields(data)
    except ProtocolViolation:
        pass


def test_dialling_noise_is_the_vector() -> None:
    assert proposal("/noise").hex() == VECTORS["mss"]["dial noise"]


@given(st.lists(st.integers(0, 200), max_size=8))
def test_multistream_agrees_in_any_cut_and_keeps_what_follows(points: list[int]) -> None:
    responder = Responder(("/a", "/b"))
    answer = b""
    for piece in cuts(proposal("/b") + b"first bytes", points):
        answer += responder.receive(piece)
    assert responder.chosen == "/b"
    assert responder.rest == b"first bytes"
    initiator = Initiator("/b")
    assert [initiator.receive(piece) for piece in cuts(answer + b"reply", points)][-1]
    assert initiator.rest == b"reply"


def test_multistream_says_no_and_bounds_proposals() -> None:
    responder = Responder(("/a",))
    assert responder.receive(proposal("/zzz")).hex().endswith(VECTORS["mss"]["na"])
    with pytest.raises(ProtocolRefused):
        Initiator("/zzz").receive(Responder(("/a",)).receive(proposal("/zzz")))
    with pytest.raises(ProtocolViolation):
        responder.receive(proposal("/zzz")[20:] * 20)


@given(st.binary(max_size=100))
def test_multistream_takes_any_garbage(data: bytes) -> None:
    for machine in (Responder(("/a",)), Initiator("/a")):
        try:
            machine.receive(data)
        except (ProtocolViolation, ProtocolRefused):
            pass


def test_the_noise_handshake_is_the_vector_byte_for_byte() -> None:
    dialler, listener = handshakes()
    expected = VECTORS["noise_xx"]
    first = dialler.write()
    listener.read(first)
    second = listener.write()
    dialler.read(second)
    third = dialler.write()
    listener.read(third)
    assert [message.hex() for message in (first, second, third)] == [expected[f"message{n}"] for n in (1, 2, 3)]
    assert dialler.result is not None
    assert listener.result is not None
    assert dialler.result.handshake_hash.hex() == expected["handshake_hash"]
    assert dialler.result.remote_peer == identity(2).peer_id
    assert listener.result.remote_peer == identity(1).peer_id
    assert dialler.result.remote_muxers == (YAMUX,)
    frame = bytes(dialler.result.sender.seal_framed(b"hello"))
    assert frame.hex() == expected["first_frame_i_to_r_of_hello"]
    assert listener.result.receiver.open(frame[2:]) == b"hello"


def test_another_network_secret_fails_the_handshake() -> None:
    dialler, listener = handshakes(prologue=b"another network")
    listener.read(dialler.write())
    with pytest.raises(UpgradeError):
        dialler.read(listener.write())


def test_a_peer_that_was_not_dialled_is_refused() -> None:
    dialler = Handshake(
        identity(1), key(0x12), key(0x11), initiator=True, expected_peer=identity(3).peer_id, muxers=(YAMUX,)
    )
    _, listener = handshakes()
    listener.read(dialler.write())
    with pytest.raises(UpgradeError, match="somebody else"):
        dialler.read(listener.write())


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60)
def test_a_handshake_message_with_any_bit_changed_is_refused(position: int, flip: int) -> None:
    dialler, listener = handshakes()
    listener.read(dialler.write())
    message = bytearray(listener.write())
    message[position % len(message)] ^= flip
    with pytest.raises(UpgradeError):
        dialler.read(bytes(message))


@pytest.mark.parametrize("muxers", [(YAMUX,), ()])
@given(points=st.lists(st.integers(0, 500), max_size=6))
@settings(max_examples=25)
def test_an_upgrade_ends_the_same_in_any_cut(muxers: tuple[str, ...], points: list[int]) -> None:
    dialler, listener = handshakes(muxers=muxers)
    ours, theirs = Upgrade(dialler, initiator=True), Upgrade(listener, initiator=False)
    to_listener, to_dialler = ours.start(), b""
    for _ in range(6):
        for piece in cuts(to_listener, points):
            to_dialler += theirs.receive(memoryview(piece))
        to_listener = b""
        for piece in cuts(to_dialler, points):
            to_listener += ours.receive(memoryview(piece))
        to_dialler = b""
    assert ours.is_done
    assert theirs.is_done


@given(st.binary(max_size=300))
def test_an_upgrade_takes_any_garbage(data: bytes) -> None:
    for upgrade in (Upgrade(handshakes()[0], initiator=True), Upgrade(handshakes()[1], initiator=False)):
        upgrade.start()
        try:
            upgrade.receive(memoryview(data))
        except UpgradeError:
            pass


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 3000), max_size=10))
def test_noise_messages_come_out_in_any_cut(messages: list[bytes], points: list[int]) -> None:
    sender, receiver, splitter = CipherState(b"k" * 32), CipherState(b"k" * 32), FrameSplitter()
    wire = b"".join(bytes(sender.seal_framed(message)) for message in messages)
    opened = [receiver.open(sealed) for piece in cuts(wire, points) for sealed in splitter.feed(memoryview(piece))]
    assert opened == messages


def test_a_replayed_noise_message_is_refused() -> None:
    sender, receiver = CipherState(b"k" * 32), CipherState(b"k" * 32)
    sealed = sender.seal(b"once")
    receiver.open(sealed)
    with pytest.raises(ProtocolViolation):
        receiver.open(sealed)


def test_identify_tells_what_was_said_and_only_of_its_speaker() -> None:
    address = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")
    data = encode_identify(identity(1), [address], ["/b", "/a"], address, "tester", 5)
    found = decode_identify(data, identity(1).peer_id)
    assert (found.addresses, found.protocols, found.agent) == ((address,), ("/b", "/a"), "tester")
    with pytest.raises(ProtocolViolation):
        decode_identify(data, identity(2).peer_id)


@given(st.binary(max_size=200))
def test_identify_takes_any_garbage(data: bytes) -> None:
    try:
        decode_identify(data, identity(1).peer_id)
    except PeerdError:
        pass
