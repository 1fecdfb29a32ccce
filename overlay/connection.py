"""One secured, multiplexed connection: the synchronous path between a socket and its streams.

Owns the upgrade, decryption into the mux, and the one writer that seals what `overlay.outbox` says comes next. Never awaits:
reading only ever enqueues and calls receivers, writing stops at the transport's high-water mark and goes on from
`resume_writing`. See docs/design.md, "one token's path".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast
from weakref import WeakKeyDictionary

from overlay import limits
from overlay.errors import ConnectionLost, LimitExceeded, PeerdError, ProtocolViolation, StreamReset, UpgradeError
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.noise.transport import PLAINTEXT_BYTES_MAX, CipherState, FrameSplitter
from overlay.outbox import Outbox
from overlay.pacing import UrgentTraffic
from overlay.stream import Priority, Stream
from overlay.upgrade import Upgrade
from overlay.uplink import Uplink
from overlay.wake import Wake
from overlay.yamux.session import GOAWAY_NORMAL, GOAWAY_PROTOCOL, Lane, Session

log = logging.getLogger(__name__)

ARRIVAL_BIT = 1 << 30
"""Marks with this bit are waited for; the others are the pacer's."""
CONTROL_IN_MESSAGE_BYTES = 2 << 10
"""Up to so much, control frames share a message with data."""

_rings: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[memoryview, memoryview]] = WeakKeyDictionary()


def receive_ring(loop: asyncio.AbstractEventLoop) -> tuple[memoryview, memoryview]:
    """What all connections of one loop receive into: the socket's bytes, and one message's plaintext."""
    ring = _rings.get(loop)
    if ring is None:
        ring = _rings[loop] = (
            memoryview(bytearray(limits.RECEIVE_RING_BYTES)),
            memoryview(bytearray(PLAINTEXT_BYTES_MAX)),
        )
    return ring


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Counters of one connection."""

    sent_bytes: int
    received_bytes: int
    streams: int
    rtt_s: float | None
    uplink_bytes_per_s: float | None


class ConnectionOwner(Protocol):
    """What a connection tells its host; synchronous."""

    urgent: UrgentTraffic

    def connection_admitted(self, connection: Connection) -> bool: ...
    def connection_upgraded(self, connection: Connection) -> None: ...
    def connection_left(self, connection: Connection) -> None: ...
    def connection_ended(self, connection: Connection, error: PeerdError) -> None: ...
    def stream_ready(self, connection: Connection, stream: Stream) -> None: ...
    def served_protocols(self) -> frozenset[str]: ...


class Connection(asyncio.BufferedProtocol):
    """See the module. Made by the host, one per socket."""

    __slots__ = (
        "_arrivals",
        "_asked_at",
        "_blocked",
        "_closed",
        "_error",
        "_is_closed",
        "_last_arrival",
        "_make_upgrade",
        "_now",
        "_outbox",
        "_owner",
        "_plain",
        "_pumping",
        "_reading",
        "_receiver",
        "_remote_peer",
        "_ring",
        "_sender",
        "_splitter",
        "_transport",
        "_upgrade",
        "_uplink",
        "is_first_meeting",
        "is_inbound",
        "last_received",
        "opened_at",
        "received_bytes",
        "remote_address",
        "schedule",
        "sent_bytes",
        "session",
        "unnegotiated",
        "upgraded",
        "was_left",
    )

    def __init__(
        self,
        owner: ConnectionOwner,
        upgrade: Callable[[], Upgrade],
        clock_now: Callable[[], float],
        *,
        is_inbound: bool,
    ) -> None:
        self._owner = owner
        self._make_upgrade: Callable[[], Upgrade] | None = upgrade
        self._now = clock_now
        self.is_inbound = is_inbound
        self.is_first_meeting = False
        """Whether it was dialled by an address alone, without knowing who is there."""
        self.remote_address: Multiaddr | None = None
        self.upgraded: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._is_closed = False
        self._closed = Wake()
        self._transport: asyncio.Transport | None = None
        self._upgrade: Upgrade | None = None
        self._remote_peer: PeerId | None = None
        self._sender: CipherState | None = None
        self._receiver: CipherState | None = None
        self._splitter = FrameSplitter()
        self.session = Session(self, client=not is_inbound)
        self._error: PeerdError | None = None
        self._blocked = False
        self._uplink = Uplink()
        self._outbox = Outbox(self.session, owner.urgent, self._uplink, clock_now)
        self.schedule = self._outbox.schedule
        """Put a stream that has something to send in its priority's queue."""
        self._pumping = False
        self._reading = False
        self.was_left = False
        """Whether one of the two sides said go-away in good order: no stream begins here any more."""
        self.sent_bytes = 0
        self.received_bytes = 0
        self.opened_at = 0.0
        self._asked_at: float | None = None
        self.last_received = 0.0
        self.unnegotiated = 0
        self._arrivals: dict[int, asyncio.Future[None]] | None = None
        """Marks of `wait_arrived`, by their numbers; nearly no connection has any."""
        self._last_arrival = 0

    # --- facts ---

    @property
    def remote_peer(self) -> PeerId:
        assert self._remote_peer is not None, "only upgraded connections leave the host"
        return self._remote_peer

    @property
    def rtt_s(self) -> float | None:
        return self.session.rtt_s

    @property
    def uplink_bytes_per_s(self) -> float | None:
        """Measured while the socket was the bottleneck, or None: it never was, or there is no wire."""
        return self._uplink.bytes_per_s

    @property
    def error(self) -> PeerdError | None:
        return self._error

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for what was written to arrive."""
        return bool(self._arrivals)

    @property
    def was_upgraded(self) -> bool:
        """Whether a peer was ever authenticated on it."""
        return self._remote_peer is not None

    @property
    def is_open(self) -> bool:
        return self._error is None and self._remote_peer is not None

    def statistics(self) -> ConnectionStatistics:
        return ConnectionStatistics(
            self.sent_bytes, self.received_bytes, len(self.session.lanes), self.rtt_s, self.uplink_bytes_per_s
        )

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(limits.WRITE_HIGH_WATER_BYTES, limits.WRITE_LOW_WATER_BYTES)
        name = transport.get_extra_info("peername")
        if isinstance(name, Multiaddr):
            self.remote_address = name
        elif name:
            self.remote_address = tcp_address(name[0], name[1])
        self._uplink.is_wire = self.remote_address is None or not self.remote_address.is_loopback
        self._ring, self._plain = receive_ring(asyncio.get_running_loop())
        self.opened_at = self.last_received = self._now()
        if not self._owner.connection_admitted(self):
            self.abort(UpgradeError("Too many handshakes at once; try again later."))
            return
        make_upgrade, self._make_upgrade = self._make_upgrade, None
        assert make_upgrade is not None, "a connection is made once"
        self._upgrade = make_upgrade()
        first = self._upgrade.start()
        if first:
            self._transport.write(first)
            self._asked_at = self.opened_at

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        self.last_received = now = self._now()
        self._reading = True
        try:
            data = self._ring[:nbytes]
            if self._upgrade is not None:
                self._upgrading(self._upgrade, data, now)
            elif self._error is None:
                self._received(data, now)
        except PeerdError as error:
            self._violated(error)
        finally:
            self._reading = False
        self.pump()

    def _upgrading(self, upgrade: Upgrade, data: memoryview, now: float) -> None:
        answer = upgrade.receive(data)
        if self._asked_at is not None:  # every message of the handshake answers the one before
            self.session.answered_after(now - self._asked_at)
        if answer and self._transport is not None:
            self._transport.write(answer)
            self._asked_at = now
        if not upgrade.is_done or upgrade.result is None:
            return
        self._upgrade = None
        result = upgrade.result
        self._remote_peer, self._sender, self._receiver = result.remote_peer, result.sender, result.receiver
        self._owner.connection_upgraded(self)
        if self._error is None:
            if not self.upgraded.done():
                self.upgraded.set_result(self)
            rest = upgrade.rest
            if rest:
                self._received(memoryview(rest), now)

    def _received(self, data: memoryview, now: float) -> None:
        receiver, session = self._receiver, self.session
        assert receiver is not None
        for sealed in self._splitter.feed(data):
            session.receive(receiver.open_into(sealed, self._plain), now)
            if self._error is not None:
                return

    def eof_received(self) -> bool:
        self._fail(ConnectionLost("The peer closed the connection."))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionLost(f"The connection broke ({exc})." if exc else "The connection was closed."))
        self._transport = None
        self._is_closed = True
        self._closed.wake()

    def pause_writing(self) -> None:
        self._blocked = True
        self._uplink.blocked(self._waiting_bytes(), self._now())

    def resume_writing(self) -> None:
        self._blocked = False
        self._uplink.resumed(self._waiting_bytes(), self._now())
        self.pump()

    def _waiting_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    # --- the mux's events ---

    def lane_opened(self, lane: Lane) -> None:
        if self.unnegotiated >= limits.STREAMS_UNNEGOTIATED_MAX or self.session.remote_gone:
            self.session.reset(lane)
            return
        stream = Stream(self, lane, Priority.CONTROL, self.last_received)
        stream.accept_from(self._owner.served_protocols())
        self.unnegotiated += 1

    def lane_data(self, lane: Lane, data: memoryview) -> None:
        if isinstance(lane.owner, Stream):
            lane.owner.data_received(data)

    def lane_finished(self, lane: Lane) -> None:
        if isinstance(lane.owner, Stream):
            lane.owner.eof_received()

    def lane_reset(self, lane: Lane) -> None:
        if isinstance(lane.owner, Stream):
            lane.owner.lost(StreamReset("The peer reset the stream."))

    def lane_window(self, lane: Lane) -> None:
        if isinstance(lane.owner, Stream) and lane.owner.outgoing:
            self.schedule(lane.owner)

    def pong(self, rtt_s: float) -> None:
        """The session keeps the round trip time. After `leave` it means that the peer knows, and has opened what it will."""
        if self.session.local_gone and not self.session.lanes:
            self.close_nowait()

    def mark_echoed(self, number: int) -> None:
        """What was written before the mark has arrived: there is room for more bulk, with the next write."""
        if not number & ARRIVAL_BIT:
            self._outbox.mark_echoed(number, self.sent_bytes)
            return
        waiting = None if self._arrivals is None else self._arrivals.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def wait_arrived(self) -> None:
        """Until all that the socket has been given by now has arrived at the peer's mux: a mark behind it was echoed.

        Raises ConnectionLost. Cancel-safe.
        """
        if self._error is not None:
            raise ConnectionLost(str(self._error))
        if self._arrivals is None:
            self._arrivals = {}
        self._last_arrival = (self._last_arrival + 1) % ARRIVAL_BIT
        number = ARRIVAL_BIT | self._last_arrival
        waiting = self._arrivals[number] = asyncio.get_running_loop().create_future()
        try:
            self.session.mark(number)
            self.pump()
            await waiting
        finally:
            self._arrivals.pop(number, None)

    def go_away(self, code: int) -> None:
        if code != GOAWAY_NORMAL:
            self._fail(ConnectionLost(f"The peer ended the connection (go-away {code})."))
        elif not self.was_left:
            self.was_left = True
            self._owner.connection_left(self)

    # --- streams ---

    def open_stream(self, protocol: str, priority: Priority = Priority.CONTROL) -> Stream:
        """A new stream whose negotiation has started; `Stream.wait_negotiated` tells its end. Raises LimitExceeded, ConnectionLost."""
        if self._error is not None:
            raise self._error
        if self.was_left:
            raise ConnectionLost("The connection is closing; dial the peer again.")
        stream = Stream(self, self.session.open(), priority, self._now())
        if priority in (Priority.DECODE, Priority.BULK):
            self.session.grant(stream.lane, limits.EXTRA_WINDOW_BYTES)
        stream.propose(protocol)
        asyncio.get_running_loop().call_soon(self.pump)
        return stream

    def stream_negotiated(self, stream: Stream) -> None:
        """An inbound or outbound stream agreed on its protocol."""
        if not stream.lane.outbound:
            self.unnegotiated -= 1
            self._owner.stream_ready(self, stream)

    def bytes_consumed(self, lane: Lane, count: int) -> None:
        """The application took bytes: credit flows back with the next write."""
        if self._error is None:
            self.session.consumed(lane, count, self._now())
            if self.session.has_control and not self._reading:
                self.pump()

    def linger_deadline(self) -> float:
        """Until when a peer may take to end a stream that was closed here."""
        return self._now() + limits.STREAM_LINGER_S

    def flush_soon(self, stream: Stream) -> None:
        """Send what ``stream`` has queued after the next turn of the loop, with what is written meanwhile."""
        asyncio.get_running_loop().call_soon(self._flush, stream)

    def _flush(self, stream: Stream) -> None:
        if stream.outgoing:
            self.schedule(stream)
            self.pump()

    # --- the writer ---

    def pump(self) -> None:
        """Seal and write until everything queued is out, windows are shut, or the socket is full."""
        if self._pumping or self._sender is None or self._transport is None or self._error is not None:
            return
        session = self.session
        outbox = self._outbox
        control, decode, bulk, blob = outbox.ready
        self._pumping = True
        try:
            while (session.has_control or control or decode or bulk or blob) and not self._blocked:
                self._write_long_control()
                plaintexts = outbox.fill(self.sent_bytes)
                if session.has_control and sum(map(len, plaintexts)) < CONTROL_IN_MESSAGE_BYTES:
                    # the FIN behind the last bytes of a stream goes out with them
                    plaintexts += outbox.fill(self.sent_bytes)
                if not plaintexts:
                    break
                sealed = self._sender.seal_framed_each(plaintexts)
                self.sent_bytes += len(sealed)
                self._transport.write(sealed)
        except ProtocolViolation as error:
            self._violated(error)
        finally:
            self._pumping = False

    def _write_long_control(self) -> None:
        """More control frames than one message holds go out in messages of their own; data follows after them."""
        if self.session.control_bytes <= CONTROL_IN_MESSAGE_BYTES:
            return
        sender, transport = self._sender, self._transport
        assert sender is not None and transport is not None
        control = self.session.poll_control()
        for start in range(0, len(control), PLAINTEXT_BYTES_MAX):
            transport.write(sender.seal_framed(control[start : start + PLAINTEXT_BYTES_MAX]))

    # --- the end ---

    def _violated(self, error: PeerdError) -> None:
        if self._sender is not None and self._transport is not None and self._error is None:
            log.warning("connection to %s ended: %s", self._remote_peer, error)
            try:
                self.session.go_away(GOAWAY_PROTOCOL)
                self._transport.write(self._sender.seal_framed(self.session.poll_control()[:PLAINTEXT_BYTES_MAX]))
            except (ProtocolViolation, LimitExceeded):
                pass
        self._fail(error)

    def _fail(self, error: PeerdError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.close()
        if not self.upgraded.done():
            self.upgraded.set_exception(error)
            self.upgraded.exception()
        for lane in self.session.live_lanes():
            if isinstance(lane.owner, Stream):
                lane.owner.lost(ConnectionLost(str(error)))
        for waiting in () if self._arrivals is None else self._arrivals.values():
            if not waiting.done():
                waiting.set_exception(ConnectionLost(str(error)))
        self._owner.connection_ended(self, error)

    def reap(self, now: float) -> None:
        """Reset streams that never agreed on a protocol in time, and those that the peer won't end after us."""
        for lane in self.session.live_lanes():
            stream = lane.owner
            if isinstance(stream, Stream) and stream.is_overdue(now):
                stream.reset("timeout")

    def leave(self) -> None:
        """End it without harm to anybody: say GOAWAY, hear out what the peer had begun, close when it knows and no stream lives."""
        if self._error is None and not self.was_left:
            self.was_left = True
            self.session.leave(self._now())
            self._owner.connection_left(self)
            self.pump()

    def finish_leaving(self) -> None:
        """The time to hear out is over: nothing new any more; closed as soon as no stream lives."""
        if self.session.lanes:
            if self.was_left:
                self.session.go_away(GOAWAY_NORMAL)
        else:
            self.close_nowait()

    def close_nowait(self) -> None:
        """Say GOAWAY, flush what the socket takes, and close."""
        if self._error is None:
            self.session.go_away(GOAWAY_NORMAL)
            self.pump()
            self._fail(ConnectionLost("The connection was closed on this side."))

    def abort(self, error: PeerdError) -> None:
        """Drop it without a word (a handshake that takes too long, a silent peer)."""
        transport = self._transport
        self._fail(error)
        if transport is not None:
            transport.abort()

    async def close(self) -> None:
        """Close, and wait (at most `CLOSE_TIMEOUT_S`) until the socket is gone."""
        self.close_nowait()
        try:
            async with asyncio.timeout(limits.CLOSE_TIMEOUT_S):
                await self.wait_closed()
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()

    async def wait_closed(self) -> None:
        """Until the connection has ended, whatever the reason."""
        while not self._is_closed:
            await self._closed.wait()
