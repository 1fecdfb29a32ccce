"""What one driver has under way: turns, in order, under the smallest credits of its hops.

Owns the turn counter, the queue before the ring and the windows in it. Knows nothing of routes, messages or time
beyond the moments that it is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from blocks.protocol import limits
from blocks.protocol.credits import Credits
from blocks.protocol.messages import Ready, Want
from overlay.rpc.types import Part


@dataclass(slots=True)
class Turn:
    """A window that the driver made: queued, or under way once it was sent."""

    turn: int
    position: int
    tokens: int
    want: Want
    hidden: Part | None
    size_bytes: int
    sent_at: float = 0.0
    cancelled: bool = False


class Ring:
    """Turns go in by `add`, into the ring by `send_next`, out of it by `answer`."""

    def __init__(self, token_bytes: int) -> None:
        self._token_bytes = token_bytes
        self._queue: deque[Turn] = deque()
        self.under_way: dict[int, Turn] = {}
        self.credits = Credits()
        self.last_turn = 0
        self.position = 0
        self.window_tokens = 0
        self.rollback_tokens = 0

    def clear(self) -> None:
        """The route is gone: all is to be sent again, from position 0; turns go on."""
        self._queue.clear()
        self.under_way.clear()
        self.credits = Credits()
        self.position = 0
        self.window_tokens = 0
        self.rollback_tokens = 0

    def take_grants(self, grants: Sequence[Ready]) -> None:
        """Every hop has said what it takes. `window_tokens` stays 0 when that's less than a token."""
        self.credits = Credits.smallest((grant.windows, grant.window_bytes) for grant in grants)
        self.rollback_tokens = min(grant.rollback_tokens for grant in grants)
        self.window_tokens = min(self.credits.bytes_granted // self._token_bytes, limits.WINDOW_TOKENS_MAX)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def room(self) -> int:
        return max(0, self.credits.windows_free - len(self._queue))

    @property
    def bytes_under_way(self) -> int:
        return sum(turn.size_bytes for turn in self.under_way.values())

    @property
    def oldest(self) -> Turn | None:
        return min(self.under_way.values(), key=lambda turn: turn.sent_at, default=None)

    def next_turn(self) -> int:
        self.last_turn += 1
        return self.last_turn

    def add(self, hidden: Part, position: int, tokens: int, want: Want) -> int:
        """Queue a window; returns its turn."""
        number = self.next_turn()
        self._queue.append(Turn(number, position, tokens, want, hidden, tokens * self._token_bytes))
        self.position = position + tokens
        return number

    def fault(self, position: int, tokens: int) -> str | None:
        """Why no such window may be added now, in a sentence, or None."""
        if tokens > self.window_tokens:
            return f"this route takes at most {self.window_tokens} tokens in a window"
        if position > self.position:
            return f"a window at {position} would leave a gap after {self.position}"
        if self.position - position > self.rollback_tokens:
            return f"this route rolls back {self.rollback_tokens} tokens at most"
        if len(self._queue) >= limits.QUEUED_WINDOWS_MAX:
            return f"more than {limits.QUEUED_WINDOWS_MAX} windows are waiting"
        return None

    @property
    def is_stuck(self) -> bool:
        """Whether the next window is larger than this route ever takes."""
        return bool(self._queue) and self._queue[0].size_bytes > self.credits.bytes_granted

    def send_next(self, now: float) -> tuple[Turn, Part | None] | None:
        """The next window that credits allow, under way from now on, with its bytes; None when there is none."""
        if not self._queue or not self.credits.take(self._queue[0].size_bytes):
            return None
        turn = self._queue.popleft()
        hidden, turn.hidden = turn.hidden, None  # token ids are the driver's journal: the bytes belong to the stream
        turn.sent_at = now
        self.under_way[turn.turn] = turn
        return turn, hidden

    def was_sent(self, number: int) -> bool:
        """Whether that turn ever went into the ring (or was dropped before, which nobody else can know)."""
        return number <= self.last_turn and all(turn.turn != number for turn in self._queue)

    def answer(self, number: int) -> None:
        """A turn's result came: its credit is back."""
        self.credits.give(self.under_way.pop(number).size_bytes)

    def cancel(self) -> None:
        """What is queued is dropped; what is under way comes back empty; the position is where the first began."""
        for turn in (*self.under_way.values(), *self._queue):
            turn.cancelled = True
            self.position = min(self.position, turn.position)
        self._queue.clear()

    def forgive(self, late_s: float) -> None:
        """Our own loop stood still: nothing took longer for it."""
        for turn in self.under_way.values():
            turn.sent_at += late_s
