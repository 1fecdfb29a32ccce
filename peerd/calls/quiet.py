"""Which servers owe a call of ours a sign of life that is overdue: what is chosen now goes to others, if there are any. Pure.

A server says once a second how far a call is. One that has missed three of these words is not lost yet, and nobody is blamed: that takes
`remote`'s longer limits. But of several servers that fall silent at once, the call that is given up first shouldn't begin anew at another.
Must not know models, batches or clocks.
"""

from __future__ import annotations

QUIET_S = 3.0
"""What a call begins with, and has again after each word."""


class QuietServers:
    """The calls under way, by server, and when the next word of each is due: as many as their owner has under way."""

    def __init__(self) -> None:
        self._due: dict[bytes, dict[bytes, float]] = {}

    def expect(self, peer: bytes, call: bytes, by: float) -> None:
        """The next word of ``call``, which is under way at ``peer``, is due ``by`` then."""
        self._due.setdefault(peer, {})[call] = by

    def end(self, peer: bytes, call: bytes) -> None:
        """``call`` is over, whatever came of it."""
        due = self._due.get(peer, {})
        due.pop(call, None)
        if not due:
            self._due.pop(peer, None)

    def is_quiet(self, peer: bytes, now: float) -> bool:
        """Whether some call under way at ``peer`` waits in vain for a word just now."""
        return any(by < now for by in self._due.get(peer, {}).values())
