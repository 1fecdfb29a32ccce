"""How many handshakes per second one address group may ask for: a token bucket per IPv4 address or IPv6 /56. Pure.

Refilled at `HANDSHAKES_PER_ADDRESS_S` with a burst; loopback and private addresses are exempt by option. Peer ids are free, so the
rate goes by address.
"""

from __future__ import annotations

import ipaddress

from overlay import limits
from overlay.multiaddr import Multiaddr


class HandshakeGate:
    """See the module."""

    def __init__(self, *, exempt_private: bool) -> None:
        self._exempt_private = exempt_private
        self._buckets: dict[str, tuple[float, float]] = {}

    def admit(self, address: Multiaddr | None, now: float) -> bool:
        """Whether a handshake from ``address`` may start now; takes a token if so."""
        if address is None or (self._exempt_private and address.is_loopback_or_private):
            return True
        group = _group_of(address)
        tokens, since = self._buckets.pop(group, (float(limits.HANDSHAKES_BURST), now))
        tokens = min(limits.HANDSHAKES_BURST, tokens + (now - since) * limits.HANDSHAKES_PER_ADDRESS_S)
        self._buckets[group] = (max(tokens - 1, 0.0) if tokens >= 1 else tokens, now)
        while len(self._buckets) > limits.HANDSHAKE_ADDRESSES_REMEMBERED:
            self._buckets.pop(next(iter(self._buckets)))
        return tokens >= 1


def _group_of(address: Multiaddr) -> str:
    host = address.host or ""
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return host
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 56), strict=False))
    return str(parsed)
