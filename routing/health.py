"""Whom to leave alone for a while, and why: typed blame with back-off. Pure.

A peer's back-off starts at 1 s and doubles to 5 min; success forgives. One that fell silent is left alone for longer at once: finding out
took seconds, will take them again, and its record outlives it by a minute. An edge's blame is the edge's. Our own faults count against
nobody (DESIGN 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from overlay.errors import Blame

BACKOFF_MIN_S = 1.0
BACKOFF_MAX_S = 300.0
WRONG_BACKOFF_S = 60.0
SILENT_BACKOFF_S = 30.0
"""About as long as the record of a server without power is still handed out, on average."""
ENTRIES_MAX = 4096
FORGET_S = 600.0


class Fault(Enum):
    """What a peer did."""

    UNREACHABLE = "unreachable"
    SILENT = "silent"
    SLOW = "slow"
    WRONG = "wrong"
    PROTOCOL = "protocol"
    EDGE = "edge"


FIRST_BACKOFF_S = {Fault.WRONG: WRONG_BACKOFF_S, Fault.SILENT: SILENT_BACKOFF_S}

FAULT_OF_CODE = {
    "unreachable": Fault.UNREACHABLE,
    "connection-lost": Fault.UNREACHABLE,
    "stream-reset": Fault.UNREACHABLE,
    "stream-closed": Fault.UNREACHABLE,
    "timed-out": Fault.SILENT,
    "silent": Fault.SILENT,
    "stalled": Fault.SLOW,
    "not-ready": Fault.SILENT,
    "bad-signature": Fault.PROTOCOL,
    "protocol-violation": Fault.PROTOCOL,
    "bad-message": Fault.PROTOCOL,
    "edge-lost": Fault.EDGE,
}


def fault_of(code: str, blame: Blame) -> Fault | None:
    """What an error says of the peer that it came from; None when it isn't the peer's."""
    if blame is Blame.EDGE:
        return Fault.EDGE
    if blame in (Blame.US, Blame.USER):
        return None
    return FAULT_OF_CODE.get(code, Fault.UNREACHABLE if blame is Blame.NETWORK else Fault.PROTOCOL)


@dataclass(slots=True)
class _Entry:
    until: float
    delay_s: float
    fault: Fault


class Health:
    """What this node experienced; hearsay is not counted."""

    def __init__(self) -> None:
        self._entries: dict[tuple[bytes, bytes], _Entry] = {}

    def blame(self, peer: bytes, fault: Fault, now: float, edge: bytes | None = None) -> None:
        """``peer`` failed; with ``edge`` only its link to that peer did."""
        if fault is Fault.EDGE and edge is None:
            return  # a link whose other end nobody named is neither end's fault
        key = (peer, edge or b"")
        known = self._entries.pop(key, None)
        delay = FIRST_BACKOFF_S.get(fault, BACKOFF_MIN_S)
        if known is not None and now - known.until <= FORGET_S:
            delay = max(delay, min(2 * known.delay_s, BACKOFF_MAX_S))
        self._entries[key] = _Entry(now + delay, delay, fault)
        while len(self._entries) > ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]

    def forgive(self, peer: bytes) -> None:
        """``peer`` did well."""
        self._entries.pop((peer, b""), None)

    def seconds_left(self, peer: bytes, now: float) -> float:
        """How much longer a peer is to be left alone."""
        entry = self._entries.get((peer, b""))
        return 0.0 if entry is None else max(0.0, entry.until - now)

    def is_avoided(self, peer: bytes, now: float) -> bool:
        return self.seconds_left(peer, now) > 0.0

    def is_edge_avoided(self, one: bytes, other: bytes, now: float) -> bool:
        """Whether the link between two peers failed lately, in either direction."""
        entries = (self._entries.get((one, other)), self._entries.get((other, one)))
        return any(entry is not None and now < entry.until for entry in entries)
