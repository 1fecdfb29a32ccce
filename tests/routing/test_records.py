"""Span records: what they carry, and any bytes that a stranger may publish."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import BadRecord
from routing.records import (
    ADAPTERS_MAX,
    ADDRESSES_MAX,
    BLOCKS_PER_GROUP,
    CACHED_BYTES_MAX,
    MANIFESTS_KEY,
    NAME_CHARS_MAX,
    NEIGHBOURS_MAX,
    RECORD_BYTES_MAX,
    RECORDS_CACHED,
    SpanRecord,
    State,
    _decode_known,
    decode_record,
    span_keys,
)
from routing.types import ModelId, Span
from tests.routing.servers import FLOAT32, MODEL, server

FULL = SpanRecord(
    b"peer", ("/ip4/1.2.3.4/tcp/1",), MODEL, Span(2, 9), State.DRAINING, FLOAT32, 0.25, 0.125, 1.5, 4096,
    ((b"other", 0.5),), ("adapter",), "0.1.0",
)  # fmt: skip


def test_a_record_survives_the_wire() -> None:
    assert decode_record(FULL.encode()) == FULL


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    try:
        decode_record(data)
    except BadRecord:
        pass


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_never_does_more_than_refuse(position: int, flip: int) -> None:
    data = bytearray(FULL.encode())
    data[position % len(data)] ^= flip
    try:
        decode_record(bytes(data))
    except BadRecord:
        pass


@pytest.mark.parametrize(("field", "value"), [
    ("s", [5, 3]), ("s", [0, 10**9]), ("m", b"short"), ("st", "asleep"), ("t", -1.0), ("t", float("nan")), ("t", "fast"),
    ("kv", -1), ("a", ["x" * 300]), ("p", b"x" * 100), ("cc", "odd"), ("n", [[1, 2]]), ("n", "other"), ("v", "\x1b[2J"),
    ("cc", "none/\n/sdpa/1"),
])  # fmt: skip
def test_a_field_out_of_bounds_is_refused(field: str, value: object) -> None:
    fields = msgpack.unpackb(FULL.encode())
    fields[field] = value
    with pytest.raises(BadRecord):
        decode_record(msgpack.packb(fields))


def test_room_that_nobody_measured_is_not_no_room() -> None:
    assert decode_record(server("a", "0:4").encode()).free_tokens is None
    assert decode_record(server("a", "0:4", free_tokens=0).encode()).free_tokens == 0


def test_the_same_bytes_are_one_record_and_bad_ones_are_refused_every_time() -> None:
    data = FULL.encode()
    assert decode_record(data) is decode_record(bytes(bytearray(data)))
    for bad in (b"junk", data[:-1], bytes(RECORD_BYTES_MAX + 1)):
        for _ in range(3):
            with pytest.raises(BadRecord):
                decode_record(bad)


def test_records_that_are_remembered_are_short_and_bounded_in_number() -> None:
    long = replace(FULL, adapters=("x" * NAME_CHARS_MAX,) * ADAPTERS_MAX).encode()
    assert len(long) > CACHED_BYTES_MAX
    before = _decode_known.cache_info()
    assert decode_record(long) == decode_record(long)
    assert _decode_known.cache_info() == before
    assert before.maxsize == RECORDS_CACHED


def test_a_server_with_all_its_neighbours_is_remembered() -> None:
    neighbours = tuple((bytes([n]) * 38, 0.5) for n in range(NEIGHBOURS_MAX))
    addresses = tuple(f"/ip4/100.100.100.{n}/udp/40000/quic-v1" for n in range(8))
    assert len(replace(FULL, addresses=addresses, neighbour_rtts=neighbours).encode()) <= CACHED_BYTES_MAX


def test_the_largest_record_fits() -> None:
    largest = SpanRecord(
        b"p" * 64, ("a" * 256,) * 99, MODEL, Span(0, 4096), State.ONLINE, FLOAT32, 1.5, 1.5, 1.5, 2**61,
        tuple((bytes([n]) * 64, 0.5) for n in range(99)), ("x" * 128,) * 99, "v" * 128,
    )  # fmt: skip
    assert len(decode_record(largest.encode()).addresses) == ADDRESSES_MAX


def test_a_span_stands_under_one_key_for_each_group_that_it_touches() -> None:
    whole = span_keys(MODEL, Span(0, 4 * BLOCKS_PER_GROUP))
    assert len(set(whole)) == 4
    assert span_keys(MODEL, Span(BLOCKS_PER_GROUP - 1, BLOCKS_PER_GROUP + 1)) == whole[:2]
    assert span_keys(MODEL, Span(0, 1)) == whole[:1]
    assert not set(whole) & set(span_keys(ModelId(b"n" * 32), Span(0, 8)))
    assert MANIFESTS_KEY not in whole


def test_servers_of_tests_are_real_records() -> None:
    assert decode_record(server("a", "0:4").encode()) == server("a", "0:4")
