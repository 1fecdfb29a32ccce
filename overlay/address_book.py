"""Where peers were, how dialling them went, and what they speak: bounded, expiring, pure.

Addresses of peers that were reached last stand first. Back-off is per address: 1 s doubling to 5 min, forgotten on success.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from overlay import limits
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr


@dataclass(slots=True)
class _Entry:
    addresses: dict[Multiaddr, float] = field(default_factory=dict)
    protocols: tuple[str, ...] = ()
    record_sequence: int = -1
    last_success: float = float("-inf")
    identified_at: float = float("-inf")
    asked_at: float = float("-inf")
    rtt_s: float | None = None
    rtt_at: float = float("-inf")


@dataclass(slots=True)
class _BackOff:
    until: float
    delay_s: float


class AddressBook:
    """Peers in order of use; the least recently used one is forgotten first."""

    def __init__(self) -> None:
        self._entries: dict[PeerId, _Entry] = {}
        self._back_off: dict[Multiaddr, _BackOff] = {}

    def add(self, peer: PeerId, addresses: Iterable[Multiaddr], now: float) -> None:
        """Remember that ``peer`` may be at ``addresses``."""
        entry = self._touch(peer)
        for address in addresses:
            entry.addresses.pop(address.without_peer(), None)
            entry.addresses[address.without_peer()] = now + limits.ADDRESS_LIFE_S
        while len(entry.addresses) > limits.ADDRESSES_PER_PEER:
            entry.addresses.pop(next(iter(entry.addresses)))

    def identified(
        self, peer: PeerId, addresses: Iterable[Multiaddr], protocols: tuple[str, ...], sequence: int, now: float
    ) -> None:
        """Take what a peer certified of itself; an older record than the last changes nothing."""
        entry = self._touch(peer)
        if sequence < entry.record_sequence:
            return
        entry.record_sequence = sequence
        entry.protocols = protocols
        entry.identified_at = now
        self.add(peer, addresses, now)

    def reached(self, peer: PeerId, address: Multiaddr | None, now: float) -> None:
        """A dial succeeded."""
        self._touch(peer).last_success = now
        if address is not None:
            self.add(peer, (address,), now)
            self._back_off.pop(address.without_peer(), None)

    def failed(self, address: Multiaddr, now: float) -> None:
        """A dial failed: leave the address alone for a while."""
        known = self._back_off.pop(address.without_peer(), None)
        delay = limits.DIAL_BACKOFF_MIN_S if known is None else min(2 * known.delay_s, limits.DIAL_BACKOFF_MAX_S)
        self._back_off[address.without_peer()] = _BackOff(now + delay, delay)
        while len(self._back_off) > limits.PEERS_REMEMBERED:
            self._back_off.pop(next(iter(self._back_off)))

    def may_dial(self, address: Multiaddr, now: float) -> bool:
        known = self._back_off.get(address.without_peer())
        return known is None or now >= known.until

    def addresses(self, peer: PeerId, now: float) -> tuple[Multiaddr, ...]:
        """Live addresses, newest first."""
        entry = self._entries.get(peer)
        if entry is None:
            return ()
        return tuple(address for address, expires in reversed(entry.addresses.items()) if expires > now)

    def protocols(self, peer: PeerId) -> tuple[str, ...]:
        """What the peer said it speaks; empty while unknown."""
        entry = self._entries.get(peer)
        return () if entry is None else entry.protocols

    def identified_at(self, peer: PeerId) -> float:
        """When the peer last said who it is; minus infinity while it hasn't."""
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.identified_at

    def asked(self, peer: PeerId, now: float) -> None:
        """The peer is being asked who it is."""
        self._touch(peer).asked_at = now

    def asked_at(self, peer: PeerId) -> float:
        """When it was last asked who it is, with or without an answer."""
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.asked_at

    def measured(self, peer: PeerId, rtt_s: float, now: float) -> None:
        """The round trip of a connection that ends."""
        entry = self._touch(peer)
        entry.rtt_s, entry.rtt_at = rtt_s, now

    def rtt_s(self, peer: PeerId, now: float) -> float | None:
        """The last known round trip, while it isn't too old."""
        entry = self._entries.get(peer)
        return None if entry is None or now - entry.rtt_at > limits.RTT_LIFE_S else entry.rtt_s

    def reached_peers(self) -> tuple[PeerId, ...]:
        """Peers that were reached, the latest first."""
        known = [
            (entry.last_success, peer) for peer, entry in self._entries.items() if entry.last_success > float("-inf")
        ]
        return tuple(peer for _, peer in sorted(known, reverse=True))

    def _touch(self, peer: PeerId) -> _Entry:
        entry = self._entries.pop(peer, None) or _Entry()
        self._entries[peer] = entry
        while len(self._entries) > limits.PEERS_REMEMBERED:
            self._entries.pop(next(iter(self._entries)))
        return entry
