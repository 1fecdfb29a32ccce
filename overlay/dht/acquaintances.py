"""Peers that were known once and where they were, the latest last and the oldest forgotten: to be tried again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr


class Acquaintances:
    """At most so many."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._addresses: dict[PeerId, tuple[Multiaddr, ...]] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, peer: PeerId, addresses: tuple[Multiaddr, ...]) -> None:
        """As the latest, with what is known of it now."""
        self._addresses.pop(peer, None)
        self._addresses[peer] = addresses
        while len(self._addresses) > self._at_most:
            del self._addresses[next(iter(self._addresses))]

    def forget(self, peer: PeerId) -> None:
        """It need not be tried."""
        self._addresses.pop(peer, None)

    def addresses(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where it was; empty for a stranger."""
        return self._addresses.get(peer, ())

    def items(self) -> list[tuple[PeerId, tuple[Multiaddr, ...]]]:
        """All of them, the latest last."""
        return list(self._addresses.items())

    def draw(self, count: int, below: Callable[[int], int]) -> Iterator[PeerId]:
        """So many of those there are now, each at most once, one after the other; ``below(n)`` draws from range(n)."""
        left = list(self._addresses)
        for _ in range(min(count, len(left))):
            yield left.pop(below(len(left)))
