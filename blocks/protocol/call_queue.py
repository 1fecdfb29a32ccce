"""Which piece of which call the device gets next: peers take turns, a peer's calls go in order. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque

PIECE_TOKENS = 2048


def pieces_of(rows: int, tokens: int, budget: int = PIECE_TOKENS) -> list[tuple[int, int]]:
    """Whole rows of at most ``budget`` tokens, at least one row; never by speed, so that a call's bits depend on the call alone."""
    step = max(1, budget // tokens)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


class CallQueue:
    """Pieces that wait; `take` gives (number, piece)."""

    def __init__(self) -> None:
        self._peers: OrderedDict[bytes, deque[tuple[int, deque[int]]]] = OrderedDict()

    def add(self, peer: bytes, number: int, pieces: int) -> None:
        """A call of ``peer`` has ``pieces`` pieces."""
        self._peers.setdefault(peer, deque()).append((number, deque(range(pieces))))

    def take(self) -> tuple[int, int] | None:
        """The next piece, of the peer whose turn it is; None when nothing waits."""
        if not self._peers:
            return None
        peer, calls = self._peers.popitem(last=False)
        number, pieces = calls[0]
        piece = pieces.popleft()
        if not pieces:
            calls.popleft()
        if calls:
            self._peers[peer] = calls  # at the end of the line
        return number, piece

    def drop(self, number: int) -> None:
        """What waits of a call is not wanted any more."""
        for peer, calls in list(self._peers.items()):
            kept = deque(entry for entry in calls if entry[0] != number)
            if kept:
                self._peers[peer] = kept
            else:
                del self._peers[peer]
