"""The yamux machine: frames in, stream events out; windows, flags and frame headers for what goes out.

Owns stream states, both directions' windows, pings and the queue of control frames. Data bodies are delivered incrementally as
views, never buffered here. Never awaits, never reads a clock. Follows libp2p specs: yamux/README, and hashicorp's original.

Remote input ends in events or in ProtocolViolation (the shell then sends `go_away_bytes` and closes), nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Protocol

from overlay.errors import LimitExceeded, ProtocolViolation

# --- fixed by the specification ---
HEADER = struct.Struct(">BBHII")
HEADER_BYTES = 12
TYPE_DATA, TYPE_WINDOW, TYPE_PING, TYPE_GOAWAY = 0, 1, 2, 3
FLAG_SYN, FLAG_ACK, FLAG_FIN, FLAG_RST = 1, 2, 4, 8
FLAGS_KNOWN = 15
INITIAL_WINDOW = 262144
CREDIT_MAX = 2**32 - 1
STREAM_ID_MAX = 2**32 - 1
GOAWAY_NORMAL, GOAWAY_PROTOCOL, GOAWAY_INTERNAL = 0, 1, 2

# --- chosen ---
STREAMS_MAX = 1024
UNACKED_STREAMS_MAX = 256
RECEIVE_WINDOW_MAX = 16 << 20
CONNECTION_WINDOW_MAX = 64 << 20
"""What all streams of a connection may have been granted beyond their initial windows."""
PONGS_QUEUED_MAX = 64
CONTROL_QUEUE_BYTES_MAX = 1 << 20
GROWTH_RTTS = 4
CREDIT_BYTES_MAX = 1 << 20
"""Credit goes back after half a window, and after so many bytes at the latest: a sender far away must not wait for half of it."""
RTT_UNKNOWN_S = 0.1
DEAD_STREAMS_REMEMBERED = 4096
MARK_BIT = 1 << 31
"""Pings with this bit are marks in what is sent (`Session.mark`); the others ask whether the peer lives."""


class LaneState(IntEnum):
    """Every phase of a stream; `Session._MOVES` is the table of what leads where."""

    OPEN = auto()
    LOCAL_CLOSED = auto()
    REMOTE_CLOSED = auto()
    CLOSED = auto()
    RESET = auto()


class Move(IntEnum):
    """What changes a stream's phase."""

    SEND_FIN = auto()
    RECEIVE_FIN = auto()
    RESET = auto()


MOVES = {
    (LaneState.OPEN, Move.SEND_FIN): LaneState.LOCAL_CLOSED,
    (LaneState.OPEN, Move.RECEIVE_FIN): LaneState.REMOTE_CLOSED,
    (LaneState.LOCAL_CLOSED, Move.RECEIVE_FIN): LaneState.CLOSED,
    (LaneState.REMOTE_CLOSED, Move.SEND_FIN): LaneState.CLOSED,
    (LaneState.OPEN, Move.RESET): LaneState.RESET,
    (LaneState.LOCAL_CLOSED, Move.RESET): LaneState.RESET,
    (LaneState.REMOTE_CLOSED, Move.RESET): LaneState.RESET,
}
"""A pair that is not here changes nothing (a second FIN, a reset of what has ended)."""


@dataclass(slots=True, eq=False)
class Lane:
    """One stream, as the machine sees it. ``owner`` is the shell's."""

    id: int
    outbound: bool
    state: LaneState = LaneState.OPEN
    send_window: int = INITIAL_WINDOW
    receive_window: int = INITIAL_WINDOW
    window_size: int = INITIAL_WINDOW
    consumed: int = 0
    """Bytes whose credit is to go back."""
    half_consumed: int = 0
    """Of the half window by whose time the window grows."""
    half_began: float = 0.0
    syn_due: bool = False
    ack_due: bool = False
    acked: bool = False
    update_queued: bool = False
    owner: object = None

    @property
    def has_ended(self) -> bool:
        return self.state in (LaneState.CLOSED, LaneState.RESET)

    @property
    def can_send(self) -> bool:
        return self.state in (LaneState.OPEN, LaneState.REMOTE_CLOSED)

    @property
    def can_receive(self) -> bool:
        return self.state in (LaneState.OPEN, LaneState.LOCAL_CLOSED)


class Events(Protocol):
    """What the shell hears. Called synchronously from `receive`; views die when the call returns."""

    def lane_opened(self, lane: Lane) -> None: ...
    def lane_data(self, lane: Lane, data: memoryview) -> None: ...
    def lane_finished(self, lane: Lane) -> None: ...
    def lane_reset(self, lane: Lane) -> None: ...
    def lane_window(self, lane: Lane) -> None: ...
    def pong(self, rtt_s: float) -> None: ...
    def mark_echoed(self, number: int) -> None: ...
    def go_away(self, code: int) -> None: ...


class Session:
    """One connection's multiplexer."""

    __slots__ = (
        "_body_flags",
        "_body_lane",
        "_body_left",
        "_control",
        "_control_bytes",
        "_dead",
        "_events",
        "_granted_extra",
        "_header",
        "_hears_out",
        "_last_remote_id",
        "_next_id",
        "_ping_value",
        "_pongs",
        "_remote_parity",
        "_unacked",
        "_updates",
        "lanes",
        "local_gone",
        "ping_sent_at",
        "remote_gone",
        "rtt_s",
    )

    def __init__(self, events: Events, *, client: bool) -> None:
        self._events = events
        self._next_id = 1 if client else 2
        self._remote_parity = 0 if client else 1
        self._last_remote_id = 0
        self.lanes: dict[int, Lane] = {}
        self._dead: dict[int, None] = {}
        self._header = bytearray()
        self._body_left = 0
        self._body_lane: Lane | None = None
        self._body_flags = 0
        self._control: list[bytes] = []
        self._control_bytes = 0
        self._pongs = 0
        self._updates: list[Lane] = []
        self._granted_extra = 0
        self._unacked = 0
        self._ping_value = 0
        self.ping_sent_at: float | None = None
        """When the unanswered ping left, or None."""
        self.rtt_s: float | None = None
        self.remote_gone = False
        self.local_gone = False
        self._hears_out = False

    @property
    def was_used(self) -> bool:
        """Whether either side ever opened a stream."""
        return self._next_id > 2 or self._last_remote_id > 0

    # --- outbound ---

    def open(self) -> Lane:
        """A new stream; its SYN is queued ahead of all data. Raises LimitExceeded.

        Were it to ride on the stream's first data, streams of different priorities would announce their ids out of order.
        """
        if self.remote_gone or self.local_gone:
            raise LimitExceeded("The connection is closing; dial the peer again.")
        if self._unacked >= UNACKED_STREAMS_MAX or len(self.lanes) >= STREAMS_MAX or self._next_id > STREAM_ID_MAX:
            raise LimitExceeded("Too many streams are open to this peer; wait for some to end.")
        lane = Lane(self._next_id, outbound=True, syn_due=True)
        self._next_id += 2
        self._unacked += 1
        self.lanes[lane.id] = lane
        self._queue(HEADER.pack(0, TYPE_WINDOW, self._take_flags(lane), lane.id, 0))
        return lane

    def data_header(self, lane: Lane, length: int) -> bytes:
        """The header of a DATA frame of ``length`` bytes, which the window must allow."""
        lane.send_window -= length
        return HEADER.pack(0, TYPE_DATA, self._take_flags(lane), lane.id, length)

    def finish(self, lane: Lane) -> None:
        """Queue a FIN in a frame of its own: some peers lose the payload of a DATA frame with FIN."""
        if (lane.state, Move.SEND_FIN) not in MOVES:
            return
        flags = self._take_flags(lane) | FLAG_FIN
        self._queue(HEADER.pack(0, TYPE_WINDOW, flags, lane.id, 0))
        self._move(lane, Move.SEND_FIN)

    def reset(self, lane: Lane) -> None:
        """Queue a RST; frames that still come are counted and dropped."""
        if (lane.state, Move.RESET) not in MOVES:
            return
        flags = self._take_flags(lane) | FLAG_RST
        self._queue(HEADER.pack(0, TYPE_WINDOW, flags, lane.id, 0))
        self._move(lane, Move.RESET)

    def grant(self, lane: Lane, extra: int) -> None:
        """Enlarge what the peer may send at once on ``lane`` (within the connection's budget)."""
        extra = min(extra, RECEIVE_WINDOW_MAX - lane.window_size, CONNECTION_WINDOW_MAX - self._granted_extra)
        if extra > 0 and lane.can_receive:
            self._granted_extra += extra
            lane.window_size += extra
            lane.consumed += extra
            self._queue_update(lane)

    def consumed(self, lane: Lane, count: int, now: float) -> None:
        """The application took ``count`` bytes: credit goes back bit by bit, and a window that is used quickly grows."""
        if not lane.can_receive:
            return
        lane.consumed += count
        lane.half_consumed += count
        if lane.half_consumed * 2 >= lane.window_size:
            self._grow(lane, now)
        if lane.consumed >= min(lane.window_size // 2, CREDIT_BYTES_MAX):
            self._queue_update(lane)

    def _grow(self, lane: Lane, now: float) -> None:
        """Half a window was taken: twice as large, if that took few round trips and the connection's budget allows."""
        rtt = self.rtt_s if self.rtt_s is not None else RTT_UNKNOWN_S
        if now - lane.half_began < GROWTH_RTTS * rtt:
            extra = min(
                lane.window_size, RECEIVE_WINDOW_MAX - lane.window_size, CONNECTION_WINDOW_MAX - self._granted_extra
            )
            if extra > 0:
                self._granted_extra += extra
                lane.window_size += extra
                lane.consumed += extra
        lane.half_consumed, lane.half_began = 0, now

    def ping(self, now: float) -> None:
        """Queue a ping unless one is under way."""
        if self.ping_sent_at is None:
            self._ping_value = (self._ping_value + 1) & (MARK_BIT - 1)
            self.ping_sent_at = now
            self._queue(HEADER.pack(0, TYPE_PING, FLAG_SYN, 0, self._ping_value))

    def mark(self, number: int) -> None:
        """Queue a ping that asks nothing but when what was written before it has arrived; `Events.mark_echoed` tells."""
        self._queue(HEADER.pack(0, TYPE_PING, FLAG_SYN, 0, MARK_BIT | number))

    def leave(self, now: float) -> None:
        """Queue GOAWAY and a ping: whatever the peer opened before it heard of it is accepted, and has come when the pong has."""
        if not self.local_gone:
            self.go_away(GOAWAY_NORMAL)
            self._hears_out = True
            self.ping_sent_at = None
            self.ping(now)

    def go_away(self, code: int) -> None:
        """Queue GOAWAY; no new streams afterwards."""
        self._hears_out = False
        if not self.local_gone:
            self.local_gone = True
            self._queue(HEADER.pack(0, TYPE_GOAWAY, 0, 0, code))

    @property
    def has_control(self) -> bool:
        return bool(self._control or self._updates)

    @property
    def control_bytes(self) -> int:
        """About how long `poll_control`'s answer would be now."""
        return self._control_bytes + HEADER_BYTES * len(self._updates)

    def poll_control(self) -> bytes:
        """Every queued control frame, ahead of any data."""
        for lane in self._updates:
            lane.update_queued = False
            if lane.consumed and lane.can_receive:
                self._control.append(HEADER.pack(0, TYPE_WINDOW, self._take_flags(lane), lane.id, lane.consumed))
                lane.receive_window += lane.consumed
                lane.consumed = 0
        self._updates.clear()
        out = b"".join(self._control)
        self._control.clear()
        self._control_bytes = 0
        self._pongs = 0
        return out

    # --- inbound ---

    def receive(self, data: memoryview, now: float) -> None:
        """Take bytes in any cut. Raises ProtocolViolation; what was delivered before stays delivered."""
        offset, end = 0, len(data)
        while offset < end:
            if self._body_left:
                take = min(self._body_left, end - offset)
                self._deliver(data[offset : offset + take])
                offset += take
                continue
            if not self._header and end - offset >= HEADER_BYTES:
                fields: tuple[int, int, int, int, int] = HEADER.unpack_from(data, offset)
                offset += HEADER_BYTES
            else:
                take = min(HEADER_BYTES - len(self._header), end - offset)
                self._header += data[offset : offset + take]
                offset += take
                if len(self._header) < HEADER_BYTES:
                    return
                fields = HEADER.unpack(self._header)
                self._header.clear()
            self._frame(fields, now)

    def _frame(self, fields: tuple[int, int, int, int, int], now: float) -> None:
        version, kind, flags, stream, length = fields
        if version != 0 or kind > TYPE_GOAWAY or flags & ~FLAGS_KNOWN:
            raise ProtocolViolation("A peer sent a frame of an unknown version, type or flag.")
        if kind == TYPE_DATA or kind == TYPE_WINDOW:
            if stream == 0:
                raise ProtocolViolation("A peer sent stream data on stream 0.")
            lane = self.lanes.get(stream)
            if flags & FLAG_SYN:
                lane = self._accept(stream, lane)
            if lane is not None and flags & FLAG_ACK and lane.outbound and not lane.acked:
                lane.acked = True
                self._unacked -= 1
            if kind == TYPE_WINDOW:
                self._window(lane, length)
                self._end_flags(lane, flags)
            else:
                self._data(lane, stream, flags, length)
        elif kind == TYPE_PING:
            self._pinged(flags, length, now)
        else:
            self.remote_gone = True
            self._events.go_away(length)

    def _accept(self, stream: int, existing: Lane | None) -> Lane | None:
        if stream % 2 != self._remote_parity or existing is not None or stream <= self._last_remote_id:
            raise ProtocolViolation("A peer opened a stream with an id that is not its own, or twice.")
        self._last_remote_id = stream
        lane = Lane(stream, outbound=False, ack_due=True, acked=True)
        if len(self.lanes) >= STREAMS_MAX or (self.local_gone and not self._hears_out):
            self._queue(HEADER.pack(0, TYPE_WINDOW, FLAG_RST, stream, 0))
            self._forget(stream)
            return None
        self.lanes[stream] = lane
        self._events.lane_opened(lane)
        return self.lanes.get(stream)

    def _window(self, lane: Lane | None, credit: int) -> None:
        if lane is None or not credit:
            return
        if lane.send_window + credit > CREDIT_MAX:
            raise ProtocolViolation("A peer granted more than a window can hold.")
        lane.send_window += credit
        self._events.lane_window(lane)

    def _data(self, lane: Lane | None, stream: int, flags: int, length: int) -> None:
        if lane is None or not lane.can_receive:
            if (
                lane is None
                and stream not in self._dead
                and stream % 2 == self._remote_parity
                and stream > self._last_remote_id
            ):
                raise ProtocolViolation("A peer sent data on a stream that it never opened.")
            if length > RECEIVE_WINDOW_MAX:
                raise ProtocolViolation("A peer sent a frame larger than any window.")
            lane = None
        else:
            if length > lane.receive_window:
                raise ProtocolViolation("A peer sent more than its window allows.")
            lane.receive_window -= length
        if length:
            self._body_left, self._body_lane, self._body_flags = length, lane, flags
        else:
            self._end_flags(lane, flags)

    def _deliver(self, data: memoryview) -> None:
        lane = self._body_lane
        self._body_left -= len(data)
        if lane is not None and lane.can_receive:
            self._events.lane_data(lane, data)
        if not self._body_left:
            self._body_lane = None
            self._end_flags(lane, self._body_flags)

    def _end_flags(self, lane: Lane | None, flags: int) -> None:
        if lane is None:
            return
        if flags & FLAG_RST and (lane.state, Move.RESET) in MOVES:
            self._move(lane, Move.RESET)
            self._events.lane_reset(lane)
        elif flags & FLAG_FIN and (lane.state, Move.RECEIVE_FIN) in MOVES:
            self._move(lane, Move.RECEIVE_FIN)
            self._events.lane_finished(lane)

    def _pinged(self, flags: int, value: int, now: float) -> None:
        if flags & FLAG_SYN:
            self._pongs += 1
            if self._pongs <= PONGS_QUEUED_MAX:
                self._queue(HEADER.pack(0, TYPE_PING, FLAG_ACK, 0, value))
        elif flags & FLAG_ACK and value & MARK_BIT:
            self._events.mark_echoed(value & (MARK_BIT - 1))
        elif flags & FLAG_ACK and self.ping_sent_at is not None and value == self._ping_value:
            rtt = max(now - self.ping_sent_at, 1e-6)
            self.ping_sent_at = None
            self.answered_after(rtt)
            self._events.pong(rtt)

    def answered_after(self, rtt: float) -> None:
        """A round trip was seen, here or before the session began."""
        rtt = max(rtt, 1e-6)
        self.rtt_s = rtt if self.rtt_s is None else min(rtt, 0.8 * self.rtt_s + 0.2 * rtt)

    # --- bookkeeping ---

    def _take_flags(self, lane: Lane) -> int:
        flags = 0
        if lane.syn_due:
            lane.syn_due = False
            flags |= FLAG_SYN
        if lane.ack_due:
            lane.ack_due = False
            flags |= FLAG_ACK
        return flags

    def _queue_update(self, lane: Lane) -> None:
        if not lane.update_queued:
            lane.update_queued = True
            self._updates.append(lane)

    def _queue(self, frame: bytes) -> None:
        self._control.append(frame)
        self._control_bytes += len(frame)
        if self._control_bytes > CONTROL_QUEUE_BYTES_MAX:
            raise ProtocolViolation("A peer provokes more control frames than it reads.")

    def _move(self, lane: Lane, move: Move) -> None:
        lane.state = MOVES[lane.state, move]
        if lane.has_ended:
            if lane.outbound and not lane.acked:
                lane.acked = True
                self._unacked -= 1
            self._granted_extra -= lane.window_size - INITIAL_WINDOW
            self.lanes.pop(lane.id, None)
            self._forget(lane.id)

    def _forget(self, stream: int) -> None:
        self._dead[stream] = None
        if len(self._dead) > DEAD_STREAMS_REMEMBERED:
            self._dead.pop(next(iter(self._dead)))

    def live_lanes(self) -> Iterator[Lane]:
        """Every stream that has not ended, in the order of opening."""
        return iter(list(self.lanes.values()))
