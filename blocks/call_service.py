"""`/peerd/tensors/1`, the serving side: streams <-> call table <-> device.

Owns one stream per call, admission by bytes before a part is read, signs of life while a call waits or runs, and the hand-over of pieces
to the device, two at a time for all calls together. What a call may say is `blocks.protocol.calls`', what a copy of one is answered
`call_table`'s, whose turn it is `call_queue`'s. docs/training.md, sections 2 and 3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.call_queue import CallQueue, pieces_of
from blocks.protocol.call_table import Answer, Begin, CallCommand, CallTable, Drop
from blocks.protocol.calls import CallRequest, Offer
from blocks.protocol.device import BackwardJob, Device, ForwardJob, JobResult
from blocks.protocol.part_lists import joined, summed
from overlay.errors import PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.ports import Clock
from overlay.rpc.channel import MessageChannel
from overlay.rpc.limits import HEADER_BYTES_MAX, NONCE_BYTES
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import error_header
from overlay.stream import Priority, Stream
from routing.types import ModelId

log = logging.getLogger(__name__)

TENSORS_PROTOCOL = "/peerd/tensors/1"
CALLS_PER_PEER = 16
CALLS_BYTES = 512 << 20
DEVICE_PIECES = 2
PROGRESS_S = 1.0
UPLOAD_S = 30.0
UPLOAD_BYTES_PER_S = 32 << 10
BUSY_RETRY_S = 0.5
REASON_CHARS = 200

Offers = Callable[[ModelId, str], Offer]
"""What is computed here of a model in a class. Raises CallFault."""


class _Channel:
    """Who waits for one answer: a stream, or a caller of this very node. ``outcome`` is None when there is nobody any more."""

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.outcome: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self.request: CallRequest | None = None

    def settle(self, message: Message | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result(message)


class _Inbound(_Channel):
    """One accepted stream."""

    def __init__(self, service: CallService, stream: Stream) -> None:
        super().__init__(stream.remote_peer.multihash)
        self._service = service
        self.size_bytes = 0
        self.nonce = b""
        self.call: object = None
        self.has_header = False
        self.channel = MessageChannel(
            stream, service.host.identity, message_bytes_max=calls.CALL_BYTES_MAX + HEADER_BYTES_MAX, admit=self._admit
        )
        self.channel.set_receiver(self)

    def _admit(self, header: Mapping[str, Any], decoded_bytes: int) -> bool:
        if self.has_header:
            self.settle(None)  # a second request on a stream ends it
            return False
        nonce = header.get("nonce")
        self.nonce = nonce if isinstance(nonce, bytes) and len(nonce) == NONCE_BYTES else b""
        self.call = header.get("call") if isinstance(header.get("call"), bytes) else None
        fault = self._service.admit(self, decoded_bytes)
        self.has_header = True
        if not self.nonce:
            self.settle(None)
            return False
        if fault is not None:
            self.settle(error_message(fault))
        return fault is None

    def message_received(self, message: Message) -> None:
        self._service.received(self, message)

    def channel_lost(self, error: PeerdError | None) -> None:
        if error is None and self.request is not None:
            return  # the caller has said all that it has to say
        self._service.lost(self)
        self.settle(None)


@dataclass(slots=True)
class _Work:
    """A call that is being computed."""

    request: CallRequest
    digest: bytes
    key: str
    pieces: list[tuple[int, int]]
    results: list[JobResult | None] = field(default_factory=list)
    begun: int = 0
    done: int = 0


class CallService:
    """See the module. Use from the loop's thread; `draining` refuses new calls."""

    def __init__(self, host: Host, device: Device, offers: Offers, clock: Clock) -> None:
        self.host = host
        self.draining = False
        self._device = device
        self._offers = offers
        self._clock = clock
        self._table = CallTable()
        self._queue = CallQueue()
        self._work: dict[int, _Work] = {}
        self._on_device = 0
        self._streams: dict[bytes, int] = {}
        self._bytes = 0
        host.serve(TENSORS_PROTOCOL, self._serve, max_inbound_per_peer=2 * CALLS_PER_PEER, priority=Priority.BULK)

    @property
    def bytes_reserved(self) -> int:
        """Of calls under way: requests and answers."""
        return self._bytes

    # --- streams ---

    async def _serve(self, stream: Stream) -> None:
        inbound = _Inbound(self, stream)
        try:
            message = await self._answer_of(inbound)
            if message is None:
                if stream.error is None:
                    inbound.channel.reset("given-up")
                return
            header = {**message.header, "nonce": inbound.nonce, "call": inbound.call}
            fresh = replace(message, header=header, recipient=b"", header_bytes=None, signature=None)
            async with asyncio.timeout(UPLOAD_S + inbound.size_bytes / UPLOAD_BYTES_PER_S):
                await inbound.channel.send_and_drain(fresh, end=True)  # resets its stream when it is out of time
            inbound.channel.close()
        except (PeerdError, TimeoutError) as error:
            log.debug("an answer to a call could not be sent: %s", error)
        finally:
            self.lost(inbound)
            self._leave(inbound)

    async def _answer_of(self, inbound: _Inbound) -> Message | None:
        """Say how far it is, once a second, until there is an answer; None when nobody waits, or the parts come too slowly."""
        started = self._clock.now()
        while True:
            done, _ = await asyncio.wait((inbound.outcome,), timeout=PROGRESS_S)
            if done:
                return inbound.outcome.result()
            upload_s = UPLOAD_S + inbound.size_bytes / UPLOAD_BYTES_PER_S
            if inbound.request is None and self._clock.now() - started > upload_s:
                return None
            if inbound.has_header:
                begun, pieces = self._progress_of(inbound)
                header = {"call": inbound.call, "nonce": inbound.nonce, "begun": begun, "of": pieces}
                inbound.channel.send(Message(calls.PROGRESS, header))

    def _progress_of(self, channel: _Channel) -> tuple[int, int]:
        for number, work in self._work.items():
            if channel in self._table.channels_of(number):
                return work.begun, len(work.pieces)
        return 0, 0

    def admit(self, inbound: _Inbound, decoded_bytes: int) -> CallFault | None:
        """Reserve what a call takes, from its header."""
        if self.draining:
            return CallFault("draining", "This server is about to leave; ask another.")
        if decoded_bytes > calls.CALL_BYTES_MAX:
            return CallFault(
                "too-large", f"A call has at most {calls.CALL_BYTES_MAX >> 20} MiB; send fewer rows at once."
            )
        count = self._streams.get(inbound.peer, 0)
        size_bytes = calls.reserved_bytes(decoded_bytes)
        if count >= CALLS_PER_PEER or self._bytes + size_bytes > CALLS_BYTES:
            return CallFault("busy", "This server has as many calls as it takes; try again soon.", BUSY_RETRY_S)
        inbound.size_bytes = size_bytes
        self._streams[inbound.peer] = count + 1
        self._bytes += inbound.size_bytes
        return None

    def _leave(self, inbound: _Inbound) -> None:
        if not inbound.size_bytes:
            return
        self._bytes -= inbound.size_bytes
        inbound.size_bytes = 0
        left = self._streams[inbound.peer] - 1
        if left:
            self._streams[inbound.peer] = left
        else:
            del self._streams[inbound.peer]

    # --- calls ---

    def received(self, inbound: _Inbound, message: Message) -> None:
        """A whole request, verified."""
        if inbound.request is not None or inbound.outcome.done():
            raise ProtocolViolation("A peer sent a second request on a stream of one call.")
        try:
            request = calls.decode_call(message)
            self._take(inbound, request, message.parts_digest)
        except CallFault as fault:
            inbound.settle(error_message(fault))

    async def call_local(self, request: CallRequest) -> Message:
        """A call of this very node, without frames and signatures. Raises CallFault. Cancel-safe."""
        if self.draining:
            raise CallFault("draining", "This daemon is about to stop.")
        channel = _Channel(self.host.peer_id.multihash)
        try:
            self._take(channel, request)
            answer = await channel.outcome
        finally:
            self.lost(channel)
        if answer is None or answer.kind == calls.ERROR:
            raise fault_of_error(answer)
        return answer

    def _take(self, channel: _Channel, request: CallRequest, parts_digest: bytes | None = None) -> None:
        offer = self._offers(request.model, request.compute_class)
        calls.check_against(request, offer)
        digest = request.digest(parts_digest)
        channel.request = request
        commands = self._table.receive(channel.peer, request.call, digest, channel, self._clock.now())
        for command in commands:
            if isinstance(command, Begin):
                pieces = pieces_of(request.rows, request.tokens)
                self._work[command.number] = _Work(request, digest, offer.key, pieces, [None] * len(pieces))
                self._queue.add(channel.peer, command.number, len(pieces))
        self._execute(commands)
        self._pump()

    def lost(self, channel: _Channel) -> None:
        """A caller is gone, or answered."""
        self._execute(self._table.channel_lost(channel))

    def _execute(self, commands: list[CallCommand]) -> None:
        for command in commands:
            if isinstance(command, Drop):
                self._queue.drop(command.number)
                self._work.pop(command.number, None)
            elif not isinstance(command, Begin):
                channel = command.channel
                assert isinstance(channel, _Channel)
                channel.settle(command.message if isinstance(command, Answer) else error_message(command.fault))

    # --- the device ---

    def _pump(self) -> None:
        while self._on_device < DEVICE_PIECES:
            taken = self._queue.take()
            if taken is None:
                return
            number, piece = taken
            self._on_device += 1
            self._work[number].begun += 1
            self._device.submit((self._job(self._work[number], piece),), self._done_with(number, piece))

    def _job(self, work: _Work, piece: int) -> ForwardJob | BackwardJob:
        start, stop = work.pieces[piece]
        request = work.request
        batch = calls.batch_rows(request.batch, start, stop)
        if request.grad is None:
            return ForwardJob(work.key, request.span, batch)
        return BackwardJob(work.key, request.span, batch, calls.rows_of(request.grad, start, stop))

    def _done_with(self, number: int, piece: int) -> Callable[[JobResult], None]:
        def done(result: JobResult) -> None:
            self._on_device -= 1
            work = self._work.get(number)
            if work is not None:
                self._piece_done(number, work, piece, result)
            self._pump()

        return done

    def _piece_done(self, number: int, work: _Work, piece: int, result: JobResult) -> None:
        if result.error is not None or result.hidden is None:
            self._queue.drop(number)
            del self._work[number]
            self._execute(self._table.failed(number, _fault_of(result.error)))
            return
        work.results[piece] = result
        work.done += 1
        if work.done < len(work.pieces):
            return
        del self._work[number]
        hidden, prompts = _joined(work)
        message = calls.answer_message(work.request, work.digest, hidden, prompts)
        self._execute(self._table.answered(number, message, self._clock.now()))


def _joined(work: _Work) -> tuple[Part, Part | None]:
    """Rows one after the other; gradients of prompts summed in their order, in float32."""
    results = [result for result in work.results if result is not None]
    hidden = [result.hidden for result in results if result.hidden is not None]
    prompts = [result.prompts for result in results if result.prompts is not None]
    return joined("hidden", hidden), summed("prompts", prompts) if prompts else None


_CODE_OF = {"busy": "busy", "not-served": "not-served", "unsupported-model": "unsupported"}
"""What a device's errors are called on the wire; any other is ours."""


def _fault_of(error: PeerdError | None) -> CallFault:
    if error is None:
        return CallFault("failed", "The device gave no result.")
    code = _CODE_OF.get(error.code, "failed")
    return CallFault(code, str(error)[:REASON_CHARS], BUSY_RETRY_S if code == "busy" else None)


def error_message(fault: CallFault) -> Message:
    """An `error` answer."""
    header = error_header(fault.code, str(fault), retryable=fault.retryable, retry_after_s=fault.retry_after_s)
    return Message(calls.ERROR, header)


def fault_of_error(message: Message | None) -> CallFault:
    """What an `error` answer says, read strictly; None: the call was given up here."""
    if message is None:
        return CallFault("failed", "The call was given up.")
    code, text, after = (message.header.get(name) for name in ("code", "message", "retry_after_s"))
    return CallFault(
        code[:64] if isinstance(code, str) else "failed",
        text[:REASON_CHARS] if isinstance(text, str) else "The server gave no reason.",
        float(after) if isinstance(after, int | float) and 0 <= after <= 3600 else None,
    )
