"""The errors of sessions: one class, a stable code each, and what a code means.

Owns the table of codes that travel in `error` and `report` messages, whether a retry can help, and whom each
blames. Must not know streams or devices.
"""

from __future__ import annotations

from blocks.protocol.coded_faults import CodedFault, Meaning
from overlay.errors import Blame

CODES: dict[str, Meaning] = {
    # A hop can't take the session now. Never a blame: it said so in time.
    "busy": Meaning(True, Blame.NETWORK),
    "draining": Meaning(True, Blame.NETWORK),
    "kv-dropped": Meaning(True, Blame.NETWORK),
    "gap": Meaning(True, Blame.NETWORK),
    "window-lost": Meaning(True, Blame.NETWORK),
    "unknown-epoch": Meaning(True, Blame.NETWORK),
    "stale-epoch": Meaning(True, Blame.US),
    # The hop and its record disagree.
    "not-served": Meaning(True, Blame.PEER),
    "wrong-class": Meaning(True, Blame.PEER),
    "compute-failed": Meaning(True, Blame.PEER),
    "stalled": Meaning(True, Blame.PEER),
    "silent": Meaning(True, Blame.PEER),
    "not-ready": Meaning(True, Blame.PEER),
    "rebooted": Meaning(True, Blame.PEER),
    "edge-lost": Meaning(True, Blame.EDGE),
    "lease-expired": Meaning(True, Blame.NETWORK),
    # Somebody broke the protocol.
    "protocol-violation": Meaning(True, Blame.PEER),
    "bad-message": Meaning(True, Blame.PEER),
    "bad-window": Meaning(True, Blame.PEER),
    "bad-signature": Meaning(True, Blame.PEER),
    "not-authorised": Meaning(True, Blame.PEER),
    "limit": Meaning(True, Blame.PEER),
    # We did.
    "overrun": Meaning(True, Blame.US),
    "conflict": Meaning(True, Blame.US),
    "unsupported": Meaning(False, Blame.US),
    "fenced": Meaning(False, Blame.US),
    "window-too-large": Meaning(False, Blame.US),
    "closed": Meaning(False, Blame.US),
}


class SessionFault(CodedFault):
    """Something that ended a session's route, a window or an `open`."""

    MEANINGS = CODES


class BadMessage(SessionFault):
    """A message that breaks the format or a bound: the sender's fault, told apart before anything changes."""

    def __init__(self, message: str, code: str = "bad-message") -> None:
        super().__init__(code, message)
