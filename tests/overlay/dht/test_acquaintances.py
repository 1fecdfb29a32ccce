"""Peers that are remembered, and drawn to be tried again."""

from __future__ import annotations

from overlay.dht.acquaintances import Acquaintances
from overlay.multiaddr import tcp_address
from tests.overlay.network import identity

PEERS = [identity(number).peer_id for number in range(1, 6)]
AT = [(tcp_address(f"10.0.0.{number}", 4001),) for number in range(1, 6)]


def known(count: int, at_most: int = 10) -> Acquaintances:
    found = Acquaintances(at_most)
    for peer, addresses in zip(PEERS[:count], AT, strict=False):
        found.add(peer, addresses)
    return found


def test_the_oldest_are_forgotten_and_who_is_met_again_is_the_latest() -> None:
    found = known(3, at_most=3)
    found.add(PEERS[0], AT[4])
    found.add(PEERS[3], AT[3])
    assert found.items() == [(PEERS[2], AT[2]), (PEERS[0], AT[4]), (PEERS[3], AT[3])]


def test_who_is_forgotten_has_no_addresses_and_forgetting_a_stranger_is_nothing() -> None:
    found = known(2)
    found.forget(PEERS[0])
    found.forget(PEERS[4])
    assert (found.addresses(PEERS[0]), found.addresses(PEERS[1]), len(found)) == ((), AT[1], 1)


def test_each_is_drawn_at_most_once_also_when_some_are_forgotten_meanwhile() -> None:
    found = known(4)
    drawn = []
    for peer in found.draw(10, lambda count: count - 1):
        drawn.append(peer)
        found.forget(peer)
    assert drawn == PEERS[3::-1]
    assert list(known(4).draw(2, lambda _: 0)) == PEERS[:2]
    assert list(known(0).draw(2, lambda _: 0)) == []
