"""What goes into the next messages of a connection, with real streams and their multiplexer; no socket and no cipher."""

from __future__ import annotations

from typing import cast

from overlay import limits
from overlay.connection import Connection
from overlay.outbox import PIECE_ALONE_BYTES, Outbox
from overlay.pacing import WINDOW_FIRST_BYTES, UrgentTraffic
from overlay.stream import Priority, Stream
from overlay.uplink import Uplink
from overlay.yamux.session import HEADER, INITIAL_WINDOW, TYPE_DATA, TYPE_PING, Lane, Session


class Line:
    """What streams and the multiplexer ask of their connection."""

    def __init__(self) -> None:
        self.now = 100.0
        self.urgent = UrgentTraffic()
        self.session = Session(self, client=True)
        self.outbox = Outbox(self.session, self.urgent, Uplink(), lambda: self.now)
        self.schedule = self.outbox.schedule

    def pump(self) -> None:
        """Nothing leaves before the test fills a message."""

    def stream(self, priority: Priority, *, window: int = INITIAL_WINDOW) -> Stream:
        lane = self.session.open()
        lane.send_window = window
        return Stream(cast(Connection, self), lane, priority, self.now)

    def frames(self, position: int = 0) -> list[tuple[int, int, int]]:
        """Of the next messages: each frame's type, lane and length."""
        rest, found = b"".join(self.outbox.fill(position)), []
        while rest:
            _, kind, _, lane, length = HEADER.unpack(rest[: HEADER.size])
            found.append((kind, lane, length))
            rest = rest[HEADER.size + (length if kind == TYPE_DATA else 0) :]
        return found

    def data(self, position: int = 0) -> list[tuple[int, int]]:
        return [(lane, length) for kind, lane, length in self.frames(position) if kind == TYPE_DATA]

    def lane_opened(self, lane: Lane) -> None: ...
    def lane_data(self, lane: Lane, data: memoryview) -> None: ...
    def lane_finished(self, lane: Lane) -> None: ...
    def lane_reset(self, lane: Lane) -> None: ...
    def lane_window(self, lane: Lane) -> None: ...
    def pong(self, rtt_s: float) -> None: ...
    def mark_echoed(self, number: int) -> None: ...
    def go_away(self, code: int) -> None: ...


def test_control_frames_go_first_then_streams_by_priority() -> None:
    line = Line()
    streams = {priority: line.stream(priority) for priority in reversed(Priority)}
    for stream in streams.values():
        stream.write_nowait(b"12345")
    frames = line.frames()
    assert [kind == TYPE_DATA for kind, _, _ in frames] == [False] * 4 + [True] * 4
    assert [lane for kind, lane, _ in frames if kind == TYPE_DATA] == [streams[one].lane.id for one in Priority]
    assert line.frames() == []


def test_streams_of_one_priority_take_turns_and_what_fills_a_message_waits_for_the_next() -> None:
    line = Line()
    one, other, call = (line.stream(priority) for priority in (Priority.BULK, Priority.BULK, Priority.CONTROL))
    one.write_nowait(bytes(100_000))
    other.write_nowait(bytes(100_000))
    first, *_ = line.data()
    call.write_nowait(b"now")
    assert first[0] == one.lane.id
    second, third, *_ = line.data()
    assert (second, third[0]) == ((call.lane.id, 3), other.lane.id)


def test_a_shut_window_takes_a_stream_out_of_its_queue_until_it_opens() -> None:
    line = Line()
    stream = line.stream(Priority.DECODE, window=3)
    stream.write_nowait(b"12345")
    assert line.data() == [(stream.lane.id, 3)]
    assert not any(line.outbox.ready)
    stream.lane.send_window = 10
    line.schedule(stream)
    line.schedule(stream)
    assert line.data() == [(stream.lane.id, 2)]
    assert not stream.outgoing


def test_bulk_waits_for_the_pacer_while_urgent_messages_share_the_uplink() -> None:
    line = Line()
    bulk = line.stream(Priority.BULK)
    bulk.write_nowait(bytes(200_000))
    line.urgent.last_at = line.now
    sent = 0
    while data := line.data(sent):
        sent += sum(length for _, length in data)
    assert WINDOW_FIRST_BYTES <= sent < 2 * WINDOW_FIRST_BYTES
    assert line.outbox.pacer.room(sent) == 0
    line.now += limits.URGENT_LIFE_S
    assert line.data(sent)


def test_a_mark_that_came_back_makes_room_for_more_bulk() -> None:
    line = Line()
    bulk = line.stream(Priority.BULK)
    bulk.write_nowait(bytes(200_000))
    line.urgent.last_at = line.now
    sent, marks = 0, 0
    while (frames := line.frames(sent)) or line.session.has_control:
        sent += sum(length for kind, _, length in frames if kind == TYPE_DATA)
        marks += sum(kind == TYPE_PING for kind, _, _ in frames)
    assert marks > 0
    line.now += 0.01
    line.outbox.mark_echoed(marks, sent)
    assert line.data(sent)


def test_long_pieces_are_handed_over_from_where_they_lie() -> None:
    line = Line()
    stream = line.stream(Priority.CONTROL)
    tensor = bytearray(PIECE_ALONE_BYTES)
    stream.write_nowait(b"header", tensor)
    head, piece = line.outbox.fill(0)
    assert bytes(head).endswith(b"header")
    tensor[0] = 7
    assert piece[0] == 7
