"""Which of the open connections are no longer worth holding. No clock, no waiting.

A connection is *quiet* while it carries no stream, nobody on this side keeps it or waits for what it sent to arrive; a ping from the
peer, who may be keeping it, counts as use; nor is it quiet when it was just dialled, for somebody is about to use it. Quiet ones are left
after `CONNECTION_IDLE_S`, and while there are more than `CONNECTIONS_EASY` at once, the longest quiet first. Those in use are never left,
however many they are.

A connection that was left takes a round trip to close, longer behind what it still carries. Those that close count too, as many as
they were of late: a node near a busy key is dialled and asked forty times a second, and has a dozen of them at any moment. Counted
as they are at this moment, each burst would empty the host of quiet connections: leaving one frees no place until it has closed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from overlay import limits
from overlay.connection import Connection
from overlay.identity import PeerId


def to_leave(quiet_since: Sequence[float], surplus: int, now: float) -> list[int]:
    """Which of the quiet connections to leave, as indices, the longest quiet first (of equals the first).

    Args:
        quiet_since: When each quiet one was last used.
        surplus: How many there are more than are held easily; below one: none.
        now: This moment.
    """
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


class ClosingLately:
    """How many connections were closing of late: an average that forgets with `CLOSING_LATELY_S`."""

    def __init__(self) -> None:
        self._average = 0.0
        self._counted_at = float("-inf")

    def count(self, closing: int, now: float) -> int:
        """Of late, after so many are closing now."""
        past = math.exp((self._counted_at - now) / limits.CLOSING_LATELY_S)
        self._average = past * self._average + (1.0 - past) * closing
        self._counted_at = now
        return round(self._average)


class IdleConnections:
    """Looks through a host's connections: no more often than one of them can have become idle, unless there are too many."""

    def __init__(self) -> None:
        self._due = float("-inf")
        self._closing = ClosingLately()

    def look_again(self) -> None:
        """A connection came back that may have been quiet for long."""
        self._due = float("-inf")

    def leave(
        self, connections: Mapping[PeerId, Connection], closing: int, kept: Collection[PeerId], now: float
    ) -> None:
        """Leave those that are idle for too long, or too many, among the open ones; ``closing`` more were left before."""
        surplus = len(connections) + self._closing.count(closing, now) - limits.CONNECTIONS_EASY
        if now < self._due and surplus <= 0:
            return
        self._due = min([found.last_received for found in connections.values()], default=now) + limits.CONNECTION_IDLE_S
        quiet = [
            found
            for peer, found in connections.items()
            if not found.session.lanes
            and not found.is_awaited
            and not (kept and peer in kept)
            and (found.session.was_used or now - found.opened_at >= limits.UNUSED_IDLE_S)
        ]
        for index in to_leave([found.last_received for found in quiet], surplus, now):
            quiet[index].leave()
