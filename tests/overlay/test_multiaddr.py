"""Multiaddrs in text and bytes: vectors, round trips, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.errors import InvalidAddress, ProtocolViolation
from overlay.multiaddr import Multiaddr

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["multiaddr"]


@pytest.mark.parametrize("text", sorted(VECTORS))
def test_bytes_are_those_of_other_implementations(text: str) -> None:
    address = Multiaddr.parse(text)
    assert address.encode().hex() == VECTORS[text]
    assert Multiaddr.decode(bytes.fromhex(VECTORS[text])) == address
    assert str(address) == text


@pytest.mark.parametrize("text", [
    "", "127.0.0.1:4001", "/", "/ip4", "/ip4/300.1.1.1/tcp/1", "/ip4/127.0.0.1/tcp/65536", "/ip4/127.0.0.1/tcp/x",
    "/ip4/127.0.0.1/carrier-pigeon/1", "/ip4/127.0.0.1/tcp/1/p2p/nobody", "/ip6/::g/tcp/1", "/dns//tcp/1",
    "/ip4/127.0.0.1/tcp/1/p2p", "/" + "ip4/127.0.0.1/" * 100,
])  # fmt: skip
def test_malformed_text_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        Multiaddr.parse(text)
    assert str(caught.value).endswith((".", "..."))


@given(st.binary(max_size=80))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        address = Multiaddr.decode(data)
    except ProtocolViolation:
        return
    assert Multiaddr.decode(address.encode()) == address
    assert Multiaddr.parse(str(address)) == address


def test_the_peer_suffix_comes_and_goes() -> None:
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    bare = Multiaddr.parse("/dns4/example.org/tcp/4001")
    assert str(bare.with_peer(peer)) == f"/dns4/example.org/tcp/4001/p2p/{peer}"
    assert bare.with_peer(peer).with_peer(peer).without_peer() == bare
    assert (bare.host, bare.port, bare.is_tcp) == ("example.org", 4001, True)


def test_an_ipfs_part_is_read_as_p2p() -> None:
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    assert Multiaddr.parse(f"/ip4/1.2.3.4/tcp/1/ipfs/{peer}") == Multiaddr.parse(f"/ip4/1.2.3.4/tcp/1/p2p/{peer}")
