"""Which of the open connections are no longer worth holding. Pure.

A connection is *quiet* while it carries no stream and nobody on this side keeps it; a ping from the peer, who may be keeping it, counts
as use; nor is it quiet when it was just dialled, for somebody is about to use it. Quiet ones are left after `CONNECTION_IDLE_S`, and
while more than `CONNECTIONS_EASY` are open at once, the longest quiet first. Those in use are never left, however many they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from overlay import limits


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
