"""The errors of tensor calls: one class, a stable code each, and what a code means (docs/training.md, section 2). Pure."""

from __future__ import annotations

from typing import NamedTuple

from overlay.errors import Blame, PeerdError


class CallMeaning(NamedTuple):
    """What a code says about the next attempt, about the sender, and to a user whose request ends with it."""

    retryable: bool
    blame: Blame
    http_status: int = 503


CALL_CODES: dict[str, CallMeaning] = {
    # The server can't take the call now. Never a blame: it said so in time.
    "busy": CallMeaning(True, Blame.NETWORK),
    "draining": CallMeaning(True, Blame.NETWORK),
    "no-turn": CallMeaning(True, Blame.NETWORK),
    # The server and its record disagree: the record was old.
    "not-served": CallMeaning(True, Blame.NETWORK),
    "wrong-class": CallMeaning(True, Blame.NETWORK),
    # The server broke, fell silent or stood still.
    "failed": CallMeaning(True, Blame.PEER, 502),
    "silent": CallMeaning(True, Blame.PEER, 504),
    "stalled": CallMeaning(True, Blame.PEER, 504),
    # We did.
    "bad-request": CallMeaning(False, Blame.US, 400),
    "too-large": CallMeaning(False, Blame.USER, 400),
    "unsupported": CallMeaning(False, Blame.US, 400),
    "conflict": CallMeaning(True, Blame.US),
    "call-expired": CallMeaning(True, Blame.US),
}
UNKNOWN_CODE = CallMeaning(True, Blame.NETWORK)
"""A newer server may have better words for a fault that another server avoids."""


class CallFault(PeerdError):
    """Why a call was not answered; what it means is looked up by its code.

    Attributes:
        retry_after_s: when the same server may be asked again (`busy`), or None.
    """

    exit_code = 1  # between servers and drivers: a fault that reaches a person has been put into other words

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        meaning = CALL_CODES.get(code, UNKNOWN_CODE)
        self.code = code
        self.retryable = meaning.retryable
        self.blame = meaning.blame
        self.http_status = meaning.http_status
        self.retry_after_s = retry_after_s
