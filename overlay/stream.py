"""One lane of a connection, for applications: pull (`read`) or push (`set_receiver`), write with or without waiting.

Owns both directions' queues of one yamux stream and the multistream negotiation at its head. A shell: it awaits its own
events only; bytes move in the connection's synchronous path.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from overlay import limits
from overlay.errors import LimitExceeded, PeerdError, ProtocolRefused, ProtocolViolation, StreamClosed, StreamReset
from overlay.identity import PeerId
from overlay.multistream import Initiator, Responder, proposal
from overlay.wake import Wake
from overlay.yamux.session import Lane

if TYPE_CHECKING:
    from overlay.connection import Connection

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview


class Priority(IntEnum):
    """Lower goes first on the wire."""

    CONTROL = 0
    DECODE = 1
    BULK = 2
    BLOB = 3


class StreamReceiver(Protocol):
    """Push mode. Called synchronously from the socket's callback; a view is valid during the call only."""

    def data_received(self, data: memoryview) -> None: ...
    def eof_received(self) -> None: ...
    def stream_lost(self, error: PeerdError) -> None: ...


class Stream:
    """A bidirectional byte pipe to a peer. Cancel-safe, except that a `write` cancelled in the middle resets it."""

    __slots__ = (
        "__weakref__",
        "_changed",
        "_deadline",
        "_eof",
        "_error",
        "_finish_after_drain",
        "_initiator",
        "_is_awaited",
        "_is_full",
        "_is_heavy",
        "_received",
        "_received_bytes",
        "_receiver",
        "_responder",
        "connection",
        "lane",
        "outgoing",
        "outgoing_bytes",
        "priority",
        "protocol",
        "scheduled",
    )

    def __init__(self, connection: Connection, lane: Lane, priority: Priority, now: float) -> None:
        self.connection = connection
        self.priority = priority
        self.protocol = ""
        self.lane = lane
        lane.owner = self
        self._initiator: Initiator | None = None
        self._responder: Responder | None = None
        self._deadline: float | None = None if lane.outbound else now + limits.NEGOTIATE_TIMEOUT_S
        self._received: deque[bytes | bytearray] | None = None
        """What came while nobody was there to take it; most streams have a receiver, and never any of it."""
        self._received_bytes = 0
        self._eof = False
        self._error: PeerdError | None = None
        self._receiver: StreamReceiver | None = None
        self._changed = Wake()
        self.outgoing: deque[memoryview] = deque()
        self.outgoing_bytes = 0
        self.scheduled = False
        self._is_heavy = False
        self._finish_after_drain = False
        self._is_full = False
        """Whether somebody waits for the queue to be low."""
        self._is_awaited = False
        """Whether somebody waits for it to be empty."""

    @property
    def remote_peer(self) -> PeerId:
        return self.connection.remote_peer

    @property
    def rank(self) -> Priority:
        """The priority of what is queued now: a long prompt is bulk, whatever its stream is for, until the last of it has left."""
        return Priority.BULK if self._is_heavy and self.priority is Priority.DECODE else self.priority

    @property
    def unread_bytes(self) -> int:
        """What came and was not read yet."""
        return self._received_bytes

    @property
    def error(self) -> PeerdError | None:
        """Why the stream can't be used any more, or None."""
        return self._error

    # --- negotiation ---

    def propose(self, protocol: str) -> None:
        """Start negotiating as the initiator; data may follow at once (lazily)."""
        self.protocol = protocol
        self._initiator = Initiator(protocol)
        self._enqueue(proposal(protocol))

    def accept_from(self, served: frozenset[str]) -> None:
        """Start negotiating as the responder."""
        self._responder = Responder(served)

    async def wait_negotiated(self) -> None:
        """Until both sides agreed. Raises ProtocolRefused, StreamReset, ConnectionLost."""
        while not self.is_negotiated and self._error is None:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def is_overdue(self, now: float) -> bool:
        """Whether the peer had its time to agree on a protocol, or to end what this side has closed and sent."""
        if self._deadline is None or now <= self._deadline:
            return False
        if self._responder is None and self.outgoing:
            self._deadline = now + limits.STREAM_LINGER_S
            return False
        return True

    @property
    def is_negotiated(self) -> bool:
        return self._initiator is None and self._responder is None

    def _negotiate(self, data: memoryview) -> bytes:
        """Feed the negotiation; returns the bytes that are the application's."""
        if self._initiator is not None:
            if not self._initiator.receive(data):
                return b""
            rest = self._initiator.rest
            self._initiator = None
        else:
            responder = self._responder
            assert responder is not None
            answer = responder.receive(data)
            if responder.chosen is None:
                if answer:
                    self._enqueue(answer)
                    self.connection.pump()
                return b""
            self.protocol, rest = responder.chosen, responder.rest
            self._responder = None
            self._deadline = None
            # Unscheduled: where the application answers at once, both go out as one message.
            view = memoryview(answer)
            self.outgoing.append(view)
            self.outgoing_bytes += len(view)
            self.connection.stream_negotiated(self)
            self.connection.flush_soon(self)
        self._changed.wake()
        return rest

    # --- reading ---

    async def read(self, max_bytes: int = 65536) -> bytes:
        """Some bytes, or ``b""`` at the end. Raises StreamReset or ConnectionLost after what had come was read."""
        while not self._received:
            if self._eof:
                return b""
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        chunk = self._received.popleft()
        if len(chunk) > max_bytes:
            self._received.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self._received_bytes -= len(chunk)
        self.connection.bytes_consumed(self.lane, len(chunk))
        return bytes(chunk)

    async def read_exactly(self, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises StreamClosed when the stream ends before."""
        out = bytearray()
        while len(out) < length:
            chunk = await self.read(length - len(out))
            if not chunk:
                raise StreamClosed("The peer ended the stream before its message was complete.")
            out += chunk
        return bytes(out)

    def set_receiver(self, receiver: StreamReceiver) -> None:
        """Switch to push mode; what is buffered is delivered at once."""
        self._receiver = receiver
        while self._received and self._receiver is receiver:
            chunk = self._received.popleft()
            self._received_bytes -= len(chunk)
            self._consume(receiver, memoryview(chunk))
        if self._receiver is not receiver:
            return
        if self._error is not None:
            receiver.stream_lost(self._error)
        elif self._eof:
            receiver.eof_received()

    def _consume(self, receiver: StreamReceiver, data: memoryview) -> None:
        """A receiver's failure ends its own stream, never the connection whose callback this is (a supervision point)."""
        try:
            receiver.data_received(data)
        except PeerdError as error:
            log.debug("%s with %s ended: %s", self.protocol, self.remote_peer.short, error)
            self.reset(error.code)
        except Exception:
            log.exception("the receiver of %s failed; its stream was reset", self.protocol)
            self.reset("internal")
        else:
            self.connection.bytes_consumed(self.lane, len(data))

    # --- writing ---

    async def write(self, *buffers: Buffer) -> None:
        """Queue ``buffers``, then wait until the queue is low. Raises StreamReset, StreamClosed, ConnectionLost."""
        self.write_nowait(*buffers)
        await self.drain()

    async def drain(self) -> None:
        """Wait until the queue is low. Raises as `write`."""
        try:
            while self.outgoing_bytes > limits.STREAM_WRITE_HIGH_WATER_BYTES and self._error is None:
                self._is_full = True
                await self._changed.wait()
        except asyncio.CancelledError:
            self.reset()
            raise
        if self._error is not None:
            raise self._error

    async def wait_sent(self) -> None:
        """Until the socket has all that was written (`Connection.wait_arrived`: until the peer has). Raises as `write`. Cancel-safe."""
        while self.outgoing and self._error is None:
            self._is_awaited = True
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def write_nowait(self, *buffers: Buffer, end: bool = False) -> None:
        """Queue ``buffers`` and transmit what the socket takes, in this call. Buffers must not change afterwards.

        With ``end`` they are the last, and FIN goes out with them.

        Raises LimitExceeded over `STREAM_SEND_QUEUE_BYTES`, StreamClosed after `close_write`, or the stream's error.
        """
        if self._error is not None:
            raise self._error
        if self._finish_after_drain or not self.lane.can_send:
            raise StreamClosed("The stream was closed for writing.")
        self._enqueue(*buffers)
        self._finish_after_drain = end and bool(self.outgoing)
        if self.outgoing_bytes > limits.STREAM_SEND_QUEUE_BYTES:
            self.reset()
            raise LimitExceeded("A peer reads too slowly; the stream to it was reset.")
        self.connection.pump()

    def _enqueue(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            if len(buffer):
                view = memoryview(buffer).cast("B")
                self.outgoing.append(view)
                self.outgoing_bytes += len(view)
        if self.outgoing_bytes > limits.URGENT_BYTES_MAX:
            self._is_heavy = True
        self.connection.schedule(self)

    def sent(self) -> None:
        """The connection moved bytes off the queue."""
        if not self.outgoing:
            self._is_heavy = False
        if self._is_full and self.outgoing_bytes <= limits.STREAM_WRITE_HIGH_WATER_BYTES:
            self._is_full = False
            self._changed.wake()
        if self._is_awaited and not self.outgoing:
            self._is_awaited = False
            self._changed.wake()
        if self._finish_after_drain and not self.outgoing:
            self._finish()

    async def close_write(self) -> None:
        """Send FIN after what is queued; reading goes on."""
        self.close_write_nowait()

    def close_write_nowait(self) -> None:
        """As `close_write`, without a task switch."""
        if self._error is None and self.lane.can_send and not self._finish_after_drain:
            self._finish_after_drain = True
            if not self.outgoing:
                self._finish()
            self.connection.pump()

    def _finish(self) -> None:
        self.connection.session.finish(self.lane)
        self._part_when_ended()

    def _part_when_ended(self) -> None:
        """What held each other lets go when nothing comes any more: it is freed at once, not when the collector finds it."""
        if self.lane.has_ended:
            self.lane.owner = None
            if self._eof:
                self._receiver = None

    def reset(self, code: str = "") -> None:
        """Give the stream up both ways; everything that waits on it raises StreamReset."""
        self._fail(StreamReset("The stream was reset on this side." + (f" ({code})" if code else "")))
        self.connection.session.reset(self.lane)
        self.lane.owner = None
        self.connection.pump()

    async def close(self) -> None:
        """FIN after what is queued, and no more interest in what comes: reset if the peer still sends."""
        self.close_write_nowait()
        if not self._eof and self._error is None and self._receiver is None:
            self._deadline = self.connection.linger_deadline()
            self.set_receiver(_Discard(self))

    # --- called by the connection ---

    def data_received(self, data: memoryview) -> None:
        """Bytes of this lane; synchronous, from the socket's callback."""
        if self._initiator is not None or self._responder is not None:
            consumed = len(data)
            try:
                rest = self._negotiate(data)
            except ProtocolRefused as error:
                self._fail(error)
                self.connection.session.reset(self.lane)
                return
            except ProtocolViolation as error:
                self.connection.session.reset(self.lane)
                self._fail(error)
                return
            self.connection.bytes_consumed(self.lane, consumed - len(rest))
            if not rest:
                return
            data = memoryview(rest)
        receiver = self._receiver
        if receiver is not None:
            self._consume(receiver, data)
            return
        if self._received is None:
            self._received = deque()
        last = self._received[-1] if self._received else b""
        if isinstance(last, bytearray) and len(last) < limits.STREAM_RECEIVE_PIECE_BYTES:
            last += data
        else:
            self._received.append(bytes(data) if len(data) >= limits.STREAM_RECEIVE_PIECE_BYTES else bytearray(data))
        self._received_bytes += len(data)
        self._changed.wake()

    def eof_received(self) -> None:
        """The peer's FIN."""
        self._eof = True
        if not self.is_negotiated:
            self._fail(StreamClosed("The peer ended the stream before agreeing on its protocol."))
            return
        self._changed.wake()
        if self._receiver is not None:
            self._receiver.eof_received()
        self._part_when_ended()

    def lost(self, error: PeerdError) -> None:
        """The peer's RST, or the connection's end."""
        self._fail(error)
        self.lane.owner = None

    def _fail(self, error: PeerdError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._responder is not None:
            self._responder = None
            self.connection.unnegotiated -= 1
        self.outgoing.clear()
        self.outgoing_bytes = 0
        self._changed.wake()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.stream_lost(error)


class _Discard:
    """After `close`: what still comes is dropped, and a peer that goes on sending is reset."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._seen = 0

    def data_received(self, data: memoryview) -> None:
        self._seen += len(data)
        if self._seen > limits.STREAM_WRITE_HIGH_WATER_BYTES:
            self._stream.reset("closed")

    def eof_received(self) -> None:
        """Both directions have ended."""

    def stream_lost(self, error: PeerdError) -> None:
        """It has ended anyway."""
