"""The outputs that a hop made, newest last, within a bound: what a resend is answered from.

Index only: the bytes are the parts themselves, never copied. Knows nothing of turns' meaning beyond their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from blocks.protocol.messages import Want
from overlay.rpc.types import Part


@dataclass(frozen=True, slots=True)
class Entry:
    """One applied window and what came out: ``hidden`` is what was passed on (None: no row was wanted)."""

    turn: int
    position: int
    tokens: int
    want: Want
    input_digest: bytes | None
    hidden: Part | None

    @property
    def end(self) -> int:
        return self.position + self.tokens

    @property
    def size_bytes(self) -> int:
        return 0 if self.hidden is None else len(self.hidden.data)


class Journal:
    """Entries of one branch, contiguous in position."""

    __slots__ = ("_bytes", "_bytes_max", "_entries", "_entries_max")

    def __init__(self, bytes_max: int, entries_max: int) -> None:
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._bytes_max = bytes_max
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def append(self, entry: Entry) -> None:
        """Keep ``entry``; older ones go first when the bound is met, and itself when it alone is over it."""
        self._entries.append(entry)
        self._bytes += entry.size_bytes
        while self._bytes > self._bytes_max or len(self._entries) > self._entries_max:
            self._bytes -= self._entries.popleft().size_bytes

    def truncate(self, position: int) -> None:
        """Forget what lies at or beyond ``position``; an entry that straddles it goes whole."""
        while self._entries and self._entries[-1].end > position:
            self._bytes -= self._entries.pop().size_bytes

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def answer_to(self, turn: int) -> Entry | None:
        """The entry of the last turn, if that's ``turn`` and it was kept."""
        if self._entries and self._entries[-1].turn == turn:
            return self._entries[-1]
        return None

    def covering(self, position: int) -> tuple[Entry, ...]:
        """Every entry from ``position`` to the end, or nothing when none starts exactly there."""
        found = tuple(entry for entry in self._entries if entry.position >= position)
        return found if found and found[0].position == position else ()

    @property
    def first_position(self) -> int:
        """The first position held (`journal_from`); 0 when empty."""
        return self._entries[0].position if self._entries else 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)
