"""What one connection sends next: control frames first, then streams by priority, round robin within one.

Owns the queues of streams that have something to send, how much of them goes into one message, and when bulk waits for urgent
traffic of the same host. Must not know sockets and ciphers: `overlay.connection` seals and writes what comes out here. Never awaits.
"""

from __future__ import annotations

from collections.abc import Callable

from overlay import limits
from overlay.noise.transport import PLAINTEXT_BYTES_MAX
from overlay.pacing import Pacer, UrgentTraffic
from overlay.stream import Priority, Stream
from overlay.uplink import Uplink
from overlay.yamux.session import HEADER_BYTES, Session

PIECE_ALONE_BYTES = 32 << 10
"""A piece of so much is sealed from where it lies, in a message of its own; smaller ones are joined, which costs less."""


class Outbox:
    """See the module. Made by its connection."""

    __slots__ = (
        "_bulk_sent_at", "_is_paced", "_now", "_session", "_uplink", "_urgent", "pacer", "ready",
    )  # fmt: skip

    def __init__(self, session: Session, urgent: UrgentTraffic, uplink: Uplink, clock_now: Callable[[], float]) -> None:
        self._session = session
        self._urgent = urgent
        self._uplink = uplink
        self._now = clock_now
        self.ready: tuple[list[Stream], ...] = tuple([] for _ in Priority)  # an idle deque takes 0.7 KiB
        """Streams with something to send, by rank."""
        self.pacer = Pacer()
        self._is_paced = False
        self._bulk_sent_at: float | None = None

    def schedule(self, stream: Stream) -> None:
        """Put a stream that has something to send in its priority's queue."""
        if not stream.scheduled and stream.outgoing:
            stream.scheduled = True
            self.ready[stream.rank].append(stream)

    def mark_echoed(self, number: int, position: int) -> None:
        """What was written before the mark has arrived; ``position`` bytes are written by now."""
        self.pacer.echoed(number, position, self._now())
        self._uplink.paced(self.pacer.rate, self._session.rtt_s)

    def fill(self, position: int) -> list[bytes | memoryview]:
        """The next Noise plaintexts, after ``position`` bytes: control frames, then frames of streams in order of priority."""
        pieces: list[bytes | memoryview] = []
        room = min(PLAINTEXT_BYTES_MAX, self._uplink.chunk_bytes(is_paced=self._is_paced))
        if self._session.has_control:
            control = self._session.poll_control()
            pieces.append(control)
            room -= len(control)
        for rank, queue in enumerate(self.ready):
            if rank >= Priority.BULK and queue and not self._may_send_bulk(position):
                break
            while queue and room > HEADER_BYTES:
                stream = queue.pop(0)
                stream.scheduled = False
                room -= self._take(stream, room, pieces)
                self._schedule_rest(stream)
            if queue:
                break
        return _joined(pieces)

    def _may_send_bulk(self, position: int) -> bool:
        """Whether bulk may add to what is under way: always, unless something urgent of this host shares the uplink."""
        now = self._now()
        if not self._urgent.is_live(now):
            self._is_paced = False
            self._bulk_sent_at = now
            return True
        if not self._is_paced:
            self._is_paced = True
            is_full = self._bulk_sent_at is not None and now - self._bulk_sent_at < limits.URGENT_LIFE_S
            self.pacer.begin(position, now, self._session.rtt_s, is_full=is_full)
        if self.pacer.wants_mark(position, now):
            self._session.mark(self.pacer.mark(position, now))
        return self.pacer.room(position) > 0

    def _schedule_rest(self, stream: Stream) -> None:
        """Queue the stream again if its window lets it go on."""
        if stream.outgoing and stream.lane.send_window > 0:
            self.schedule(stream)

    def _take(self, stream: Stream, room: int, pieces: list[bytes | memoryview]) -> int:
        lane = stream.lane
        if not lane.can_send:
            return 0
        budget = min(room - HEADER_BYTES, lane.send_window, stream.outgoing_bytes)
        if budget <= 0:
            return 0
        if stream.rank is Priority.DECODE:
            self._urgent.last_at = self._now()
        pieces.append(self._session.data_header(lane, budget))
        left = budget
        while left:
            view = stream.outgoing[0]
            if len(view) <= left:
                pieces.append(view)
                left -= len(view)
                stream.outgoing.popleft()
            else:
                pieces.append(view[:left])
                stream.outgoing[0] = view[left:]
                left = 0
        stream.outgoing_bytes -= budget
        stream.sent()
        return HEADER_BYTES + budget


def _joined(pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Runs of small pieces put together; large ones as they are, which saves a copy of every tensor."""
    if not pieces or max(map(len, pieces)) < PIECE_ALONE_BYTES:
        return [b"".join(pieces)] if pieces else []
    joined: list[bytes | memoryview] = []
    run: list[bytes | memoryview] = []
    for piece in pieces:
        if len(piece) < PIECE_ALONE_BYTES:
            run.append(piece)
            continue
        if run:
            joined.append(b"".join(run))
            run = []
        joined.append(piece)
    if run:
        joined.append(b"".join(run))
    return joined
