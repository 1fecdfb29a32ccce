"""Frames: any cut, any mutation, every size before its bytes; codecs and signatures with them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.errors import ProtocolViolation
from overlay.rpc import limits
from overlay.rpc.codec import Codec, choose_codec, decode_planes, encode_part
from overlay.rpc.frame import PART_ENTRY, PREFIX, FrameDecoder, encode_frame, encode_header
from overlay.rpc.signing import is_authentic, sign
from overlay.rpc.types import DTYPE_BYTES, Message, Part
from tests.overlay.network import identity

ONE, TWO = identity(1), identity(2)


def part(name: str, dtype: str, *shape: int) -> Part:
    count = DTYPE_BYTES[dtype]
    for length in shape:
        count *= length
    return Part(name, dtype, shape, bytes(index * 37 % 251 for index in range(count)))


def wire(message: Message, sequence: int = 0, codec: Codec = Codec.RAW, signed: bool = True) -> bytes:
    header = encode_header(message, ONE.peer_id.multihash, TWO.peer_id.multihash)
    signature = sign(ONE, header, message.parts) if signed else None
    buffers = encode_frame(header, message.parts, sequence, signature, choose=lambda _: codec)
    return b"".join(bytes(buffer) for buffer in buffers)


WINDOW = Message(
    "window", {"n": 7, "s": b"x" * 16, "deep": {"a": [1, None, True, 0.5]}}, (part("hidden", "bfloat16", 3, 64),)
)


@pytest.mark.parametrize("codec", list(Codec))
@given(points=st.lists(st.integers(0, 3000), max_size=8))
@settings(max_examples=40)
def test_frames_come_out_in_any_cut(codec: Codec, points: list[int]) -> None:
    data = wire(WINDOW, 0, codec) + wire(Message("beat", {}), 1) + wire(WINDOW, 2, codec)
    decoder, frames = FrameDecoder(), []
    for start, end in pairwise(sorted({0, len(data), *(point % len(data) for point in points)})):
        frames += decoder.feed(memoryview(data)[start:end])
    assert [frame.sequence for frame in frames] == [0, 1, 2]
    assert decoder.is_idle
    first = frames[0].message
    assert (first.kind, first.header["n"], first.header["deep"]) == ("window", 7, {"a": [1, None, True, 0.5]})
    assert (first.sender, first.recipient) == (ONE.peer_id.multihash, TWO.peer_id.multihash)
    assert bytes(first.parts[0].data) == WINDOW.parts[0].data
    assert first.parts[0].shape == (3, 64)
    assert all(is_authentic(frame.message) for frame in frames)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=300)
def test_a_changed_byte_is_refused_or_not_authentic_or_not_signed_for(position: int, flip: int) -> None:
    data = bytearray(wire(WINDOW))
    position %= len(data)
    data[position] ^= flip
    try:
        frames = FrameDecoder().feed(memoryview(bytes(data)))
    except ProtocolViolation:
        return
    for frame in frames:
        unsigned_fields = 1 <= position < 2 or 8 <= position < 16  # flags and sequence: the channel authenticates them
        assert unsigned_fields or not is_authentic(frame.message)


@given(st.binary(max_size=400))
def test_any_bytes_are_taken_or_refused_and_a_broken_decoder_stays_broken(data: bytes) -> None:
    decoder = FrameDecoder()
    try:
        decoder.feed(memoryview(data))
    except ProtocolViolation:
        with pytest.raises(ProtocolViolation):
            decoder.feed(memoryview(b"anything else"))


@pytest.mark.parametrize("prefix", [
    PREFIX.pack(2, 1, 0, 10, 0), PREFIX.pack(1, 8, 0, 10, 0), PREFIX.pack(1, 0, 17, 10, 0),
    PREFIX.pack(1, 0, 0, limits.HEADER_BYTES_MAX + 1, 0), PREFIX.pack(1, 0, 0, 0, 0),
    PREFIX.pack(1, 0, 1, 10, 0) + PART_ENTRY.pack(0, 0, 0, 2**32 - 1, 2**32 - 1),
    PREFIX.pack(1, 0, 3, 10, 0) + PART_ENTRY.pack(0, 0, 0, 1 << 26, 1 << 26) * 3,
    PREFIX.pack(1, 0, 1, 10, 0) + PART_ENTRY.pack(9, 0, 0, 4, 4), PREFIX.pack(1, 0, 1, 10, 0) + PART_ENTRY.pack(0, 0, 0, 4, 8),
], ids=["version", "flag", "parts", "long header", "no header", "huge part", "huge total", "codec", "raw sizes"])  # fmt: skip
def test_sizes_over_their_limits_are_refused_before_a_byte_of_them_comes(prefix: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        FrameDecoder().feed(memoryview(prefix))


@pytest.mark.parametrize("described", [
    [["hidden", "bfloat16", [3, 63]]], [["hidden", "complex64", [1]]], [["hidden", "bfloat16", [-3, -64]]],
    [["hidden", "bfloat16", "x"]], [], [["hidden", "bfloat16", [3, 64]]] * 2, [[1, 2, 3]], "p", [["x" * 100, "uint8", [384]]],
])  # fmt: skip
def test_parts_that_are_not_as_described_are_refused(described: object) -> None:
    fields = msgpack.unpackb(encode_header(WINDOW, b"", b""))
    header = msgpack.packb(fields | {"p": described})
    buffers = encode_frame(header, WINDOW.parts, 0, bytes(64))
    with pytest.raises(ProtocolViolation):
        FrameDecoder().feed(memoryview(b"".join(bytes(buffer) for buffer in buffers)))


def test_a_feature_that_must_be_understood_and_is_not_is_refused() -> None:
    asked = Message("window", {"crit": ["teleport"], "teleport": 1})
    with pytest.raises(ProtocolViolation, match="upgrade"):
        FrameDecoder().feed(memoryview(wire(asked)))
    assert FrameDecoder(understood=frozenset({"teleport"})).feed(memoryview(wire(asked)))
    assert FrameDecoder().feed(memoryview(wire(Message("window", {"teleport": 1}))))


def test_a_signature_holds_whatever_codec_carried_the_parts() -> None:
    raw, packed = (FrameDecoder().feed(memoryview(wire(WINDOW, 0, codec)))[0].message for codec in Codec)
    assert raw.signature == packed.signature
    assert is_authentic(packed)


@given(st.sampled_from(sorted(DTYPE_BYTES)), st.binary(max_size=600))
def test_planes_lose_nothing(dtype: str, data: bytes) -> None:
    width = DTYPE_BYTES[dtype]
    data = data[: len(data) // width * width]
    packed = encode_part(Part("x", dtype, (len(data) // width,), data), Codec.PLANES_ZSTD)
    assert decode_planes(bytes(packed), width, len(data)) == data


def test_a_compressed_bomb_is_refused_before_it_is_made() -> None:
    bomb = bytes(encode_part(Part("x", "uint8", (1 << 20,), bytes(1 << 20)), Codec.PLANES_ZSTD))
    assert len(bomb) < 2000
    with pytest.raises(ProtocolViolation):
        decode_planes(bomb, 1, 1000)
    with pytest.raises(ProtocolViolation):
        decode_planes(b"not zstd at all", 1, 1000)


def test_compression_is_for_links_that_are_slower_than_it() -> None:
    big = part("hidden", "bfloat16", 512, 64)
    assert choose_codec(big, None) is Codec.RAW
    assert choose_codec(big, 1e10) is Codec.RAW
    assert choose_codec(big, 1e6) is Codec.PLANES_ZSTD
    assert choose_codec(part("ids", "int64", 1024), 1e6) is Codec.RAW


def test_our_own_message_over_a_limit_is_our_own_error() -> None:
    with pytest.raises(ValueError, match="limits"):
        encode_header(Message("x", {"long": b"x" * limits.HEADER_BYTES_MAX}), b"", b"")


def test_a_message_that_is_not_wanted_is_dropped_before_its_parts_are_read() -> None:
    asked: list[tuple[str, int]] = []

    def admit(header: Mapping[str, Any], decoded_bytes: int) -> bool:
        asked.append((header["k"], decoded_bytes))
        return False

    decoder = FrameDecoder(admit=admit)
    part = Part("data", "uint8", (4096,), bytes(4096))
    message = Message("upload", {}, (part,))
    buffers = encode_frame(encode_header(message, b"a", b"b"), message.parts, 0, bytes(64))
    sent = b"".join(bytes(buffer) for buffer in buffers)
    for start in range(0, len(sent), 100):
        assert decoder.feed(memoryview(sent[start : start + 100])) == []
    assert asked == [("upload", 4096)]
    assert decoder.feed(memoryview(b"anything")) == []
