"""Records that come again: verified once while they are remembered, and a forged one never passes as its good twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nacl.bindings import crypto_sign_open

from overlay.dht import limits
from overlay.dht.records import decode_record, decode_records, encode_record, encode_records, seal_record
from overlay.errors import ProtocolViolation
from tests.overlay.network import identity


def test_a_record_that_ten_holders_give_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[bytes] = []

    def counting(signed: bytes, public_key: bytes) -> bytes:
        verified.append(signed)
        return crypto_sign_open(signed, public_key)

    monkeypatch.setattr("overlay.identity.crypto_sign_open", counting)
    records = [seal_record(identity(1), b"again", bytes([number]), 1, 60, b"value") for number in range(5)]
    for _ in range(10):
        assert decode_records(encode_records(records), 5) == records
    assert len(verified) == 5


def test_a_forged_twin_of_a_remembered_record_is_refused_each_time() -> None:
    good = seal_record(identity(1), b"twin", b"sub", 1, 60, b"value")
    assert decode_record(encode_record(good)) == good
    for _ in range(2):
        with pytest.raises(ProtocolViolation, match="signature"):
            decode_record(encode_record(replace(good, value=b"other")))


def test_long_records_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    long = encode_record(seal_record(identity(1), b"long", b"sub", 1, 60, bytes(limits.CACHED_RECORD_BYTES_MAX)))
    decode_record(long)
    monkeypatch.setattr("overlay.identity.crypto_sign_open", lambda signed, public_key: pytest.fail("verified"))
    with pytest.raises(pytest.fail.Exception):
        decode_record(long)
