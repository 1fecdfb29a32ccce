"""Which of the open connections are no longer worth holding. No clock, no waiting.

A connection is *quiet* while it carries no stream and nobody on this side keeps it; a ping from the peer, who may be keeping it, counts
as use; nor is it quiet when it was just dialled, for somebody is about to use it. Quiet ones are left after `CONNECTION_IDLE_S`, and
while more than `CONNECTIONS_EASY` are open at once, the longest quiet first. Those in use are never left, however many they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from overlay import limits
from overlay.connection import Connection
from overlay.identity import PeerId


def to_leave(quiet_since: Sequence[float], open_count: int, now: float) -> list[int]:
    """Which of the quiet connections to leave, as indices, the longest quiet first (of equals the first).

    Args:
        quiet_since: When each quiet one was last used.
        open_count: How many are open in all, quiet or not.
        now: This moment.
    """
    surplus = open_count - limits.CONNECTIONS_EASY
    least_s = 0.0 if surplus > 0 else limits.CONNECTION_IDLE_S
    order = sorted(
        [index for index, since in enumerate(quiet_since) if now - since >= least_s],
        key=lambda index: quiet_since[index],
    )
    return [
        index
        for place, index in enumerate(order)
        if place < surplus or now - quiet_since[index] >= limits.CONNECTION_IDLE_S
    ]


class IdleConnections:
    """Looks through a host's connections, no more often than one of them can have become idle."""

    def __init__(self) -> None:
        self._due = float("-inf")

    def look_again(self) -> None:
        """A connection came back that may have been quiet for long."""
        self._due = float("-inf")

    def leave(self, connections: Mapping[PeerId, Connection], kept: Collection[PeerId], now: float) -> None:
        """Leave those that are idle for too long, or too many, among the open ones."""
        if now < self._due and len(connections) <= limits.CONNECTIONS_EASY:
            return
        self._due = min([found.last_received for found in connections.values()], default=now) + limits.CONNECTION_IDLE_S
        quiet = [
            found
            for peer, found in connections.items()
            if not found.session.lanes
            and not (kept and peer in kept)
            and (found.session.was_used or now - found.opened_at >= limits.UNUSED_IDLE_S)
        ]
        for index in to_leave([found.last_received for found in quiet], len(connections), now):
            quiet[index].leave()
