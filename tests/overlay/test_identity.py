"""Peer ids, envelopes and peer records against published vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overlay.errors import InvalidAddress, ProtocolViolation
from overlay.identity import (
    IDENTITY_FILE,
    BadIdentity,
    Identity,
    PeerId,
    open_peer_record,
    seal_peer_record,
    verify,
)
from overlay.multiaddr import Multiaddr
from tests.overlay.network import MemoryStorage, identity, system_ports

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


@pytest.mark.parametrize("entry", VECTORS["peer"])
def test_peer_ids_are_those_of_libp2p(entry: dict[str, str]) -> None:
    made = Identity(bytes.fromhex(entry["seed"]))
    assert made.public_key.hex() == entry["public"]
    assert str(made.peer_id) == entry["peer_id"]
    assert made.peer_id.multihash.hex() == entry["multihash"]
    assert PeerId.from_text(entry["peer_id"]) == made.peer_id


def test_a_peer_id_reads_the_same_from_its_cid_form() -> None:
    base58 = PeerId.from_text("12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq")
    assert PeerId.from_text("bafzaajaiaejcahwr5d5ofrfbis4l5d6uwr57hu5tjodrypfm6yaq6dsc2r2pzyt6") == base58


@pytest.mark.parametrize(
    "text", ["", "12D3", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0OIl", "b" * 60, "x" * 500]
)
def test_what_is_no_ed25519_peer_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidAddress):
        PeerId.from_text(text)


def test_a_peer_record_is_the_vector_byte_for_byte() -> None:
    record = seal_peer_record(identity(1), 1700000000000, [Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")])
    assert record.hex() == VECTORS["peer_record"]["envelope"]
    assert open_peer_record(record) == (
        identity(1).peer_id,
        1700000000000,
        (Multiaddr.parse("/ip4/127.0.0.1/tcp/4001"),),
    )


def test_a_record_with_any_byte_changed_is_refused_or_says_the_same() -> None:
    record = seal_peer_record(identity(1), 7, [Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")])
    honest = open_peer_record(record)
    for index in range(len(record)):
        forged = record[:index] + bytes([record[index] ^ 1]) + record[index + 1 :]
        try:
            assert open_peer_record(forged) == honest
        except ProtocolViolation:
            continue


def test_an_identity_is_kept_and_a_damaged_one_is_not_replaced() -> None:
    storage, ports = MemoryStorage(), system_ports()
    first = Identity.load_or_create(storage, ports.randomness)
    assert Identity.load_or_create(storage, ports.randomness).peer_id == first.peer_id
    storage.saved[IDENTITY_FILE] = storage.saved[IDENTITY_FILE][:-1] + b"\0"
    with pytest.raises(BadIdentity):
        Identity.load_or_create(storage, ports.randomness)


def test_only_the_signer_verifies() -> None:
    signature = identity(1).sign(b"words")
    assert verify(identity(1).peer_id, signature, b"words")
    assert not verify(identity(2).peer_id, signature, b"words")
    assert not verify(identity(1).peer_id, signature, b"other words")
    assert not verify(identity(1).peer_id, b"short", b"words")
