"""When is a hop lost? What a driver heard of one hop, and the deadlines that follow from it.

Follows `docs/protocol.md`, "Liveness". Pure arithmetic on times that it is given.
"""

from __future__ import annotations

from blocks.protocol import limits
from blocks.protocol.messages import Heartbeat, Ready
from blocks.protocol.session_errors import SessionFault


class HopWatch:
    """One hop of one epoch, as its driver sees it."""

    __slots__ = ("heard_at", "oldest_s", "opened_at", "progress_at", "ready", "steps")

    def __init__(self, now: float) -> None:
        self.opened_at = now
        self.heard_at = now
        self.progress_at = now
        self.ready: Ready | None = None
        self.steps = -1
        self.oldest_s: float | None = None

    def took_place(self, ready: Ready, now: float) -> None:
        self.ready = ready
        self.heard_at = self.progress_at = now

    def beat(self, heartbeat: Heartbeat, now: float) -> None:
        """Progress is an engine step, or an oldest window that is younger than before."""
        self.heard_at = now
        oldest_s = heartbeat.oldest_s
        younger = oldest_s is None or self.oldest_s is None or oldest_s < self.oldest_s
        if heartbeat.steps != self.steps or younger:
            self.progress_at = now
        self.steps = heartbeat.steps
        self.oldest_s = oldest_s

    def rebooted(self, boot_id: bytes | None) -> bool:
        return self.ready is not None and boot_id is not None and boot_id != self.ready.boot_id

    def forgive(self, late_s: float) -> None:
        """Our own loop stood still for ``late_s``: what wasn't heard meanwhile counts against nobody."""
        self.opened_at += late_s
        self.heard_at += late_s
        self.progress_at += late_s

    def fault(self, now: float, heartbeat_s: float, progress_s: float) -> SessionFault | None:
        """Why this hop is to be held lost at ``now``, or None."""
        if self.ready is None:
            if now - self.opened_at > limits.READY_DEADLINE_S:
                return SessionFault("not-ready", "the hop did not take its place in time")
            return None
        if now - self.heard_at > limits.SILENT_HEARTBEATS * heartbeat_s:
            return SessionFault("silent", f"nothing was heard of the hop for {now - self.heard_at:.1f} s")
        if self.oldest_s is not None and now - self.progress_at > progress_s:
            return SessionFault("stalled", f"the hop's engine stood still for {now - self.progress_at:.1f} s")
        return None


def progress_deadline_s(tokens: int, longest_s: float) -> float:
    """How long an engine may stand still with a window of ``tokens`` before it, in seconds."""
    floor_s = limits.PROGRESS_FLOOR_S + limits.PROGRESS_PER_TOKEN_S * (tokens - 1)
    return max(floor_s, limits.PROGRESS_FACTOR * longest_s)


def ring_deadline_s(hops: int, size_bytes: int, progress_s: float) -> float:
    """How long a turn may be under way before it is lost somewhere, whatever the hops say, in seconds."""
    return max(limits.STALL_MAX_S, hops * progress_s) + hops * size_bytes / limits.LINK_BYTES_PER_S_MIN
