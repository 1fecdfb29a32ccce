"""The tables of `docs/protocol.md` section 4 as data: which rule answers which message, and the phases.

Every transition of both machines lives in this file; the machines look their next step up here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto


class Age(Enum):
    """How a message's epoch compares with the session's at the receiver."""

    LOWER = auto()
    EQUAL = auto()
    HIGHER = auto()


class HopPhase(Enum):
    """One hop of one session. No session at all is the absence of the object."""

    OPEN = auto()
    """The control channel lives."""
    LINGERING = auto()
    """The control channel is gone; the KV waits for its driver until the lease ends."""
    CLOSED = auto()


HOP_PHASES: Mapping[HopPhase, frozenset[HopPhase]] = {
    HopPhase.OPEN: frozenset({HopPhase.OPEN, HopPhase.LINGERING, HopPhase.CLOSED}),
    HopPhase.LINGERING: frozenset({HopPhase.OPEN, HopPhase.CLOSED}),
    HopPhase.CLOSED: frozenset(),
}


class DriverPhase(Enum):
    """A session at its driver."""

    IDLE = auto()
    OPENING = auto()
    FLOWING = auto()
    LOST = auto()
    """The route was lost and said so; waits for the next `Driver.open`."""
    CLOSED = auto()


DRIVER_PHASES: Mapping[DriverPhase, frozenset[DriverPhase]] = {
    DriverPhase.IDLE: frozenset({DriverPhase.OPENING, DriverPhase.CLOSED}),
    DriverPhase.OPENING: frozenset({DriverPhase.OPENING, DriverPhase.FLOWING, DriverPhase.LOST, DriverPhase.CLOSED}),
    DriverPhase.FLOWING: frozenset({DriverPhase.OPENING, DriverPhase.LOST, DriverPhase.CLOSED}),
    DriverPhase.LOST: frozenset({DriverPhase.OPENING, DriverPhase.CLOSED}),
    DriverPhase.CLOSED: frozenset(),
}


class HopRule(Enum):
    """What a hop does with a message whose sender has the authority for it."""

    IGNORE = auto()
    OPEN_NEWER = auto()
    OPEN_AGAIN = auto()
    OPEN_STALE = auto()
    WINDOW = auto()
    HOLD = auto()
    CANCEL = auto()
    RENEW = auto()
    CLOSE = auto()
    RESEND = auto()
    PASS_REFUSAL = auto()
    UNSUPPORTED = auto()


HOP_CELLS: Mapping[str, Mapping[Age, HopRule]] = {
    "open": {Age.LOWER: HopRule.OPEN_STALE, Age.EQUAL: HopRule.OPEN_AGAIN, Age.HIGHER: HopRule.OPEN_NEWER},
    "window": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.WINDOW, Age.HIGHER: HopRule.HOLD},
    "cancel": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.CANCEL, Age.HIGHER: HopRule.IGNORE},
    "heartbeat": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.RENEW, Age.HIGHER: HopRule.IGNORE},
    "close": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.CLOSE, Age.HIGHER: HopRule.CLOSE},
    "gap": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.RESEND, Age.HIGHER: HopRule.IGNORE},
    "error": {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.PASS_REFUSAL, Age.HIGHER: HopRule.IGNORE},
    "reserved": dict.fromkeys(Age, HopRule.UNSUPPORTED),
}


class DriverRule(Enum):
    """What a driver does with a message from the hop that it names."""

    IGNORE = auto()
    VIOLATION = auto()
    READY = auto()
    RESULT = auto()
    GAP = auto()
    BEAT = auto()
    REPORT = auto()
    LEAVING = auto()
    ERROR = auto()


def _at_driver(rule: DriverRule) -> Mapping[Age, DriverRule]:
    return {Age.LOWER: DriverRule.IGNORE, Age.EQUAL: rule, Age.HIGHER: DriverRule.VIOLATION}


DRIVER_CELLS: Mapping[str, Mapping[Age, DriverRule]] = {
    "ready": _at_driver(DriverRule.READY),
    "result": _at_driver(DriverRule.RESULT),
    "gap": _at_driver(DriverRule.GAP),
    "heartbeat": _at_driver(DriverRule.BEAT),
    "report": _at_driver(DriverRule.REPORT),
    "leaving": _at_driver(DriverRule.LEAVING),
    "error": _at_driver(DriverRule.ERROR),
}
