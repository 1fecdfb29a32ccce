"""Signed records: what is accepted, what is refused, and which of two wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.dht import limits
from overlay.dht.records import (
    DOMAIN,
    Record,
    decode_record,
    decode_records,
    encode_record,
    encode_records,
    merge,
    seal_record,
)
from overlay.errors import LimitExceeded, ProtocolViolation
from tests.overlay.network import identity

KEY = b"key" * 8


def sealed(
    number: int = 1, sequence: int = 1, value: bytes = b"value", subkey: bytes = b"sub", ttl_s: int = 60
) -> Record:
    return seal_record(identity(number), KEY, subkey, sequence, ttl_s, value)


def signed_by_hand(
    key: bytes = KEY, subkey: bytes = b"sub", sequence: int = 1, ttl_s: int = 60, value: bytes = b"value"
) -> Record:
    """What `seal_record` refuses to sign, a liar signs."""
    liar = identity(1)
    packed: bytes = msgpack.packb([key, liar.peer_id.multihash, subkey, sequence, ttl_s, value])
    return Record(key, liar.peer_id, subkey, sequence, ttl_s, value, liar.sign(DOMAIN + packed))


def test_a_record_survives_the_wire() -> None:
    assert decode_record(encode_record(sealed())) == sealed()


@given(st.integers(0, 1000), st.integers(1, 255))
def test_a_record_with_any_byte_changed_is_refused(position: int, flip: int) -> None:
    data = bytearray(encode_record(sealed()))
    data[position % len(data)] ^= flip
    with pytest.raises(ProtocolViolation):
        decode_record(bytes(data))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_record(data)


@pytest.mark.parametrize("changes", [
    {"sequence": 2}, {"ttl_s": 3600}, {"value": b"other"}, {"subkey": b"other"}, {"key": b"other"},
    {"publisher": identity(2).peer_id}, {"signature": bytes(64)},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_every_field_is_signed_for(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        decode_record(encode_record(replace(sealed(), **changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [
    {"value": b"x" * (limits.VALUE_BYTES_MAX + 1)}, {"ttl_s": limits.TTL_S_MAX + 1}, {"ttl_s": 0},
    {"subkey": b"x" * (limits.SUBKEY_BYTES_MAX + 1)},
])  # fmt: skip
def test_our_own_record_over_a_limit_is_not_signed(wrong: dict[str, object]) -> None:
    with pytest.raises(LimitExceeded):
        sealed(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [
    {"key": b""}, {"key": bytes(limits.KEY_BYTES_MAX + 1)}, {"subkey": bytes(limits.SUBKEY_BYTES_MAX + 1)},
    {"value": bytes(limits.VALUE_BYTES_MAX + 1)}, {"value": bytes(limits.RECORD_BYTES_MAX)},
    {"ttl_s": 0}, {"ttl_s": -1}, {"ttl_s": limits.TTL_S_MAX + 1},
    {"sequence": -1}, {"sequence": limits.SEQUENCE_MAX + 1},
], ids=lambda wrong: next(iter(wrong)))  # fmt: skip
def test_a_record_over_a_limit_is_refused_however_well_it_is_signed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation, match="limit"):
        decode_record(encode_record(signed_by_hand(**wrong)))


@pytest.mark.parametrize("most", [
    {"key": bytes(limits.KEY_BYTES_MAX)}, {"subkey": bytes(limits.SUBKEY_BYTES_MAX)}, {"subkey": b""},
    {"value": bytes(limits.VALUE_BYTES_MAX)}, {"value": b""}, {"ttl_s": 1}, {"ttl_s": limits.TTL_S_MAX},
    {"sequence": 0}, {"sequence": limits.SEQUENCE_MAX},
], ids=lambda most: next(iter(most)))  # fmt: skip
def test_a_record_at_a_limit_is_taken(most: dict[str, Any]) -> None:
    record = signed_by_hand(**most)
    assert decode_record(encode_record(record)) == record


def test_a_bad_entry_spoils_only_itself() -> None:
    good, forged = sealed(), replace(sealed(2), value=b"forged")
    assert decode_records(encode_records([good, forged, good]), 10) == [good, None, good]
    with pytest.raises(ProtocolViolation):
        decode_records(encode_records([good] * 11), 10)


def test_the_highest_sequence_of_each_name_wins_whatever_the_order() -> None:
    old, new, other = sealed(sequence=1), sealed(sequence=2), sealed(2)
    for order in ([old, new, other], [new, other, old]):
        held: dict[tuple[bytes, bytes], Record] = {}
        merge(held, order)
        assert set(held.values()) == {new, other}
