"""A message channel on a stream: frames, sequence numbers and signatures in one synchronous path.

Owns the frame decoder of one stream and its counters. A wrong sequence number, sender, recipient or signature resets the
stream with a code and is reported to the receiver as the peer's fault. Knows nothing of what messages mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

from overlay.errors import LimitExceeded, PeerdError, ProtocolViolation, StreamClosed
from overlay.identity import Identity
from overlay.rpc import limits
from overlay.rpc.codec import Codec, choose_codec
from overlay.rpc.frame import Admit, FrameDecoder, encode_frame, encode_header
from overlay.rpc.signing import is_authentic, sign
from overlay.rpc.types import Message, Part
from overlay.stream import Stream
from overlay.wake import Wake

RECEIVED_MESSAGES_MAX = 64


class ChannelReceiver(Protocol):
    """Push mode; called synchronously from the socket's callback."""

    def message_received(self, message: Message) -> None: ...
    def channel_lost(self, error: PeerdError | None) -> None:
        """Once, at the end; None when the peer ended it in good order."""


@dataclass(slots=True)
class ChannelStatistics:
    """Counters of one channel; seconds are of this process's own work."""

    sent: int = 0
    received: int = 0
    codec_s: float = 0.0
    signature_s: float = 0.0


class MessageChannel:
    """See the module. With ``verify_first`` False a message is handed over before its signature was checked.

    The receiver must then call `verify` before anything that the message led to leaves the node. ``admit`` is asked about a message
    when its header is there, before its parts are; see `overlay.rpc.frame.Admit`.
    """

    def __init__(
        self,
        stream: Stream,
        identity: Identity,
        *,
        verify_first: bool = True,
        allow_foreign_sender: bool = False,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
        admit: Admit | None = None,
    ) -> None:
        self.stream = stream
        self.remote_peer = stream.remote_peer.multihash
        self.statistics = ChannelStatistics()
        self._identity = identity
        self._local_peer = identity.peer_id.multihash
        self._verify_first = verify_first
        self._allow_foreign_sender = allow_foreign_sender
        self._decoder = FrameDecoder(message_bytes_max=message_bytes_max, admit=admit)
        self._send_sequence = 0
        self._receive_sequence = 0
        self.received_bytes = 0
        """Of messages that have come and of the one that is coming."""
        self._receiver: ChannelReceiver | None = None
        self._queue: list[Message] = []
        self._arrived = Wake()
        self._ended = False
        self._error: PeerdError | None = None
        stream.set_receiver(self)

    # --- sending ---

    def send(self, message: Message, *, end: bool = False, close: bool = False) -> None:
        """Sign, frame and transmit in this call; with ``close`` it is the last.

        Raises StreamReset, StreamClosed, ConnectionLost, LimitExceeded.
        """
        if message.header_bytes is not None and message.signature is not None:
            header, signature = message.header_bytes, message.signature
        else:
            header = encode_header(message, self._local_peer, message.recipient or self.remote_peer)
            started = time.perf_counter()
            signature = sign(self._identity, header, message.parts, message.parts_digest)
            self.statistics.signature_s += time.perf_counter() - started
        started = time.perf_counter()
        buffers = encode_frame(header, message.parts, self._send_sequence, signature, end=end, choose=self._choose)
        self.statistics.codec_s += time.perf_counter() - started
        self._send_sequence += 1
        self.statistics.sent += 1
        self.stream.write_nowait(*buffers, end=close)

    def _choose(self, part: Part) -> Codec:
        return choose_codec(part, self.stream.connection.uplink_bytes_per_s)

    async def send_and_drain(self, message: Message, *, end: bool = False, close: bool = False) -> None:
        """As `send`, then wait until the stream's queue is low."""
        self.send(message, end=end, close=close)
        await self.stream.drain()

    def close(self) -> None:
        """End our direction after what was sent."""
        self.stream.close_write_nowait()

    def reset(self, code: str = "") -> None:
        """Give the stream up both ways."""
        self._ended = True
        self._receiver = None
        self.stream.reset(code)

    # --- receiving ---

    def set_receiver(self, receiver: ChannelReceiver) -> None:
        """Switch to push mode; what is queued is delivered at once."""
        self._receiver = receiver
        while self._queue and self._receiver is receiver:
            receiver.message_received(self._queue.pop(0))
        if self._ended and self._receiver is receiver:
            self._receiver = None
            receiver.channel_lost(self._error)

    async def receive(self) -> Message:
        """The next message. Raises StreamClosed at the end, or what broke the stream. Cancel-safe."""
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StreamClosed("The peer ended the conversation.")
            await self._arrived.wait()
        return self._queue.pop(0)

    def verify(self, message: Message) -> bool:
        """Whether the sender signed it; counts the time."""
        started = time.perf_counter()
        good = is_authentic(message)
        self.statistics.signature_s += time.perf_counter() - started
        return good

    def data_received(self, data: memoryview) -> None:
        """From the stream."""
        if self._ended:
            return
        self.received_bytes += len(data)
        try:
            started = time.perf_counter()
            frames = self._decoder.feed(data)
            self.statistics.codec_s += time.perf_counter() - started
            for frame in frames:
                self._accept(frame.message, frame.sequence)
        except ProtocolViolation as error:
            self._fail(error)

    def _accept(self, message: Message, sequence: int) -> None:
        if sequence != self._receive_sequence:
            raise ProtocolViolation("A peer sent messages out of sequence.")
        self._receive_sequence += 1
        if message.recipient != self._local_peer:
            raise ProtocolViolation("A peer sent a message that is meant for somebody else.")
        if message.sender != self.remote_peer and not self._allow_foreign_sender:
            raise ProtocolViolation("A peer sent a message in somebody else's name.")
        if message.signature is None or (self._verify_first and not self.verify(message)):
            raise ProtocolViolation("A peer sent a message with a wrong signature.")
        self.statistics.received += 1
        if self._receiver is not None:
            self._receiver.message_received(message)
            return
        if len(self._queue) >= RECEIVED_MESSAGES_MAX:
            raise ProtocolViolation("A peer sends more messages than were asked for.")
        self._queue.append(message)
        self._arrived.wake()

    def eof_received(self) -> None:
        """From the stream."""
        if not self._decoder.is_idle:
            self._fail(ProtocolViolation("A peer ended its stream in the middle of a message."))
            return
        self._end(None)

    def stream_lost(self, error: PeerdError) -> None:
        """From the stream."""
        self._end(error)

    def _fail(self, error: PeerdError) -> None:
        self._end(error)
        if self.stream.error is None:
            self.stream.reset(error.code)

    def _end(self, error: PeerdError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._arrived.wake()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.channel_lost(error)


def addressed(message: Message, sender: bytes, recipient: bytes) -> Message:
    """The message with both ends named, for hand-over in process."""
    return replace(message, sender=sender, recipient=recipient)


__all__ = ["ChannelReceiver", "ChannelStatistics", "LimitExceeded", "MessageChannel", "addressed"]
