"""The errors of tensor calls: one class, a stable code each, and what a code means (docs/training.md, section 2). Pure."""

from __future__ import annotations

from blocks.protocol.coded_faults import CodedFault, Meaning
from overlay.errors import Blame

CALL_CODES: dict[str, Meaning] = {
    # The server can't take the call now. Never a blame: it said so in time.
    "busy": Meaning(True, Blame.NETWORK),
    "draining": Meaning(True, Blame.NETWORK),
    "no-turn": Meaning(True, Blame.NETWORK),
    # The server and its record disagree: the record was old.
    "not-served": Meaning(True, Blame.NETWORK),
    "wrong-class": Meaning(True, Blame.NETWORK),
    # The server broke, fell silent or stood still.
    "failed": Meaning(True, Blame.PEER, 502),
    "silent": Meaning(True, Blame.PEER, 504),
    "stalled": Meaning(True, Blame.PEER, 504),
    # We did.
    "bad-request": Meaning(False, Blame.US, 400),
    "too-large": Meaning(False, Blame.USER, 400),
    "unsupported": Meaning(False, Blame.US, 400),
    "conflict": Meaning(True, Blame.US),
    "call-expired": Meaning(True, Blame.US),
}


class CallFault(CodedFault):
    """Why a call was not answered."""

    MEANINGS = CALL_CODES
