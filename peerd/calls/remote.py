"""One tensor call to one server: a stream, a signed request, signs of life, a signed answer.

The driver's side of docs/training.md, section 2. Reads while it writes, so that an early refusal is heard; tells a server that is slow, or
has others before us, from one that is lost. Knows nothing of micro-batches or of other servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from blocks.call_service import TENSORS_PROTOCOL, fault_of_error
from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.call_queue import pieces_of
from blocks.protocol.calls import CallRequest
from overlay.errors import InvalidAddress, PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.channel import MessageChannel
from overlay.rpc.limits import HEADER_BYTES_MAX, NONCE_BYTES
from overlay.rpc.types import Message
from overlay.stream import Priority, Stream
from peerd.calls.quiet import QUIET_S

OPEN_TIMEOUT_S = 8.0
CALL_SILENCE_S = 5.0
FIRST_WORD_S = 15.0
CALL_STALL_S = 60.0
CALL_TURN_S = 120.0
"""How long a call waits for its turn at one server that has others before it and says so; its parts' way there comes on top."""
UPLOAD_BYTES_PER_S = 32 << 10
"""What comes or goes slower than this doesn't move."""
LOOK_S = 0.5


class _Ears:
    """What the server says on one stream."""

    def __init__(self, request: CallRequest, nonce: bytes, now: float) -> None:
        self._call = request.call
        self._pieces = len(pieces_of(request.rows, request.tokens))
        self._turn_s = CALL_TURN_S + sum(part.size_bytes for part in request.parts) / UPLOAD_BYTES_PER_S
        self._nonce = nonce
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.heard = False
        self.heard_at = now
        self.moved_at = now
        self._begun = 0
        self._came = (0, now)

    def bytes_came(self, total: int, now: float) -> None:
        """How many have come on this stream: an answer that is long on its way is a sign of life, and the only one meanwhile."""
        before, then = self._came
        if total == before:
            self._came = before, now
            return
        self.heard, self.heard_at = True, now
        if total - before >= UPLOAD_BYTES_PER_S * (now - then):
            self.moved_at = now
        self._came = total, now

    def message_received(self, message: Message) -> None:
        now = asyncio.get_running_loop().time()
        self.heard, self.heard_at = True, now
        if self.answer.done():
            raise ProtocolViolation("A server answered a call twice.")
        if message.header.get("nonce") != self._nonce or message.header.get("call") != self._call:
            self._fail(ProtocolViolation("A server answered another call than it was asked."))
        elif message.kind == calls.PROGRESS:
            begun = message.header.get("begun")
            begun = min(begun, self._pieces) if isinstance(begun, int) else 0  # it can't begin more than there is
            if begun > self._begun:
                self._begun, self.moved_at = begun, now
        elif message.kind == calls.ERROR:
            self._fail(fault_of_error(message))
        else:
            self.answer.set_result(message)

    def channel_lost(self, error: PeerdError | None) -> None:
        self._fail(error or CallFault("failed", "The server ended the call without an answer."))

    def _fail(self, error: PeerdError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def ignore(self) -> None:
        """Whatever came is not asked for any more."""
        if self.answer.done():
            self.answer.exception()
        else:
            self.answer.cancel()

    def word_due_s(self, now: float, queued_bytes: int) -> float:
        """In how many seconds the next word of a server that is well has come; negative when it is overdue."""
        queued_s = 0.0 if self.heard else queued_bytes / UPLOAD_BYTES_PER_S
        return QUIET_S + queued_s - (now - self.heard_at)

    def overdue(self, now: float, queued_bytes: int) -> CallFault | None:
        """Whether the server is lost, by what it said."""
        if not self.heard:
            if now - self.heard_at > FIRST_WORD_S + queued_bytes / UPLOAD_BYTES_PER_S:
                return CallFault("silent", "The server didn't take the call.")
        elif now - self.heard_at > CALL_SILENCE_S:
            return CallFault("silent", "The server fell silent in the middle of a call.")
        elif not self._begun and now - self.moved_at > self._turn_s:
            return CallFault("no-turn", "The server has had others before this call for too long; try again later.")
        elif self._begun and now - self.moved_at > CALL_STALL_S:
            return CallFault("stalled", "The server stands still in the middle of a call.")
        return None


def _nobody_asks(due_s: float) -> None:
    """When the next word is due."""


async def call_remote(
    host: Host,
    peer: bytes,
    addresses: Sequence[str],
    request: CallRequest,
    expect: Callable[[float], None] = _nobody_asks,
) -> Message:
    """One call. Raises CallFault, ProtocolViolation or the overlay's errors. Cancel-safe: the stream is reset.

    Args:
        expect: hears, every `LOOK_S` once there is a stream, in how many seconds the server's next word is due.
    """
    stream: Stream = await host.open_stream(
        _named(peer),
        TENSORS_PROTOCOL,
        addresses=_readable(addresses),
        priority=Priority.BULK,
        timeout_s=OPEN_TIMEOUT_S,
    )
    loop = asyncio.get_running_loop()
    nonce = host.ports.randomness.token(NONCE_BYTES)
    ears = _Ears(request, nonce, loop.time())
    channel = MessageChannel(stream, host.identity, message_bytes_max=calls.CALL_BYTES_MAX + HEADER_BYTES_MAX)
    channel.set_receiver(ears)
    message = request.to_message()
    answered = False
    try:
        try:
            channel.send(replace(message, header={**message.header, "nonce": nonce}), end=True)
        except PeerdError:
            if not ears.answer.done():  # what came before the write failed is the better word
                raise
        answer = await _answer(ears, channel, expect)
        fault = calls.fault_of_answer(request, request.digest(message.parts_digest), answer)
        if fault is not None:
            raise ProtocolViolation(f"A server answered a call with {fault}.")
        channel.close()
        answered = True
        return answer
    finally:
        if not answered:
            channel.reset("given-up")
            ears.ignore()


def _named(peer: bytes) -> PeerId:
    try:
        return PeerId.from_bytes(peer)
    except InvalidAddress:
        raise CallFault("failed", "A server's record names no peer.") from None


def _readable(addresses: Sequence[str]) -> list[Multiaddr]:
    """Of what a record says, the addresses: the rest is its publisher's fault, and no error of ours."""
    found = []
    for address in addresses:
        try:
            found.append(Multiaddr.parse(address))
        except InvalidAddress:
            continue
    return found


async def _answer(ears: _Ears, channel: MessageChannel, expect: Callable[[float], None]) -> Message:
    loop, stream = asyncio.get_running_loop(), channel.stream
    while True:
        expect(ears.word_due_s(loop.time(), stream.outgoing_bytes))
        done, _ = await asyncio.wait((ears.answer,), timeout=LOOK_S)
        if done:
            return ears.answer.result()
        ears.bytes_came(channel.received_bytes, loop.time())
        fault = ears.overdue(loop.time(), stream.outgoing_bytes)
        if fault is not None:
            raise fault
