"""What one connection's way out carries, as far as it showed. Pure.

Two things measure it: how fast a full socket empties, and the pacer's rounds. Both also show readers that have no time, so a slower
figure replaces a faster one only by and by, and what a peer on this machine or on its wire makes wait says nothing. Must not know
sockets, frames or streams.
"""

from __future__ import annotations

from overlay import limits


class Uplink:
    """One connection's. ``now`` is in seconds of any monotonic clock."""

    __slots__ = ("_blocked_at", "_blocked_bytes", "_measured_at", "bytes_per_s", "is_wire")

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        """Measured while the socket was the bottleneck, or None: it never was."""
        self.is_wire = True
        """False to a loopback address, where nothing but a reader without time makes the socket wait: then it stays None."""
        self._blocked_at = 0.0
        self._blocked_bytes = 0
        self._measured_at = 0.0

    def blocked(self, waiting: int, now: float) -> None:
        """The socket took no more, and ``waiting`` bytes stand before it."""
        self._blocked_at, self._blocked_bytes = now, waiting

    def resumed(self, waiting: int, now: float) -> None:
        """All but ``waiting`` of them have gone."""
        elapsed_s, moved = now - self._blocked_at, self._blocked_bytes - waiting
        if not self.is_wire or elapsed_s <= 0 or moved <= 0:
            return
        kept = 0.5 ** ((now - self._measured_at) / limits.UPLINK_HALF_LIFE_S)
        self.bytes_per_s = max(moved / elapsed_s, (self.bytes_per_s or 0.0) * kept)
        self._measured_at = now

    def paced(self, rate: float | None, rtt_s: float | None) -> None:
        """The pacer's rounds showed ``rate`` bytes a second, to a peer ``rtt_s`` away."""
        if self.is_wire and rate is not None and (rtt_s or 0.0) >= limits.NEAR_RTT_S:
            self.bytes_per_s = rate

    def chunk_bytes(self, *, is_paced: bool) -> int:
        """The longest frame, so that priorities act: `CHUNK_SECONDS` of what the uplink carries. ``is_paced``: beside urgent messages."""
        if self.bytes_per_s is None:
            return limits.CHUNK_BYTES_PACED if is_paced and self.is_wire else limits.CHUNK_BYTES_MAX
        return min(limits.CHUNK_BYTES_MAX, max(limits.CHUNK_BYTES_MIN, int(self.bytes_per_s * limits.CHUNK_SECONDS)))
