"""What the errors of sessions and of calls share: a stable code, and a table that says what each code means. Pure.

A code that this version doesn't know is the network's, and retryable: a newer peer may have better words for a fault that another
server avoids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from overlay.errors import Blame, PeerdError


class Meaning(NamedTuple):
    """What a code says about the next attempt, about the sender, and to a user whose request ends with it."""

    retryable: bool
    blame: Blame
    http_status: int = 503


UNKNOWN = Meaning(True, Blame.NETWORK)


class CodedFault(PeerdError):
    """A fault whose meaning is looked up by its code, in its class's table.

    Attributes:
        retry_after_s: when the same peer may be asked again (`busy`), or None.
    """

    MEANINGS: ClassVar[Mapping[str, Meaning]] = {}
    exit_code = 1  # between servers and drivers: a fault that reaches a person has been put into other words

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retryable, self.blame, self.http_status = self.MEANINGS.get(code, UNKNOWN)
        self.retry_after_s = retry_after_s
