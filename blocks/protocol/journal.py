"""The outputs that a hop made, newest last, within a bound: what a resend is answered from.

Index only: the bytes are the parts themselves, never copied. Knows nothing of turns' meaning beyond their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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


@dataclass(slots=True)
class JournalRoom:
    """What all journals of a node hold together, counted as they change."""

    used_bytes: int = 0


class Journal:
    """Entries of one branch, contiguous in position."""

    __slots__ = ("_bytes", "_bytes_max", "_entries", "_entries_max", "_room")

    def __init__(self, bytes_max: int, entries_max: int, room: JournalRoom | None = None) -> None:
        self._room = room or JournalRoom()
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
        self._count(entry.size_bytes)
        while self._bytes > self._bytes_max or len(self._entries) > self._entries_max:
            self.shed_oldest()

    def shed_oldest(self) -> int:
        """Forget the oldest entry; returns its bytes, 0 when there was none."""
        if not self._entries:
            return 0
        size_bytes = self._entries.popleft().size_bytes
        self._count(-size_bytes)
        return size_bytes

    def _count(self, more_bytes: int) -> None:
        self._bytes += more_bytes
        self._room.used_bytes += more_bytes

    def truncate(self, position: int) -> None:
        """Forget what lies at or beyond ``position``; an entry that straddles it goes whole."""
        while self._entries and self._entries[-1].end > position:
            self._count(-self._entries.pop().size_bytes)

    def clear(self) -> None:
        self._entries.clear()
        self._count(-self._bytes)

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


def bound_together(journals: Sequence[Journal], bytes_max: int) -> None:
    """Have journals hold at most ``bytes_max`` in all: the largest loses its oldest entries first, of equals the first."""
    over = sum(journal.size_bytes for journal in journals) - bytes_max
    while over > 0:
        largest = max(journals, key=lambda journal: journal.size_bytes)
        over -= largest.shed_oldest()
