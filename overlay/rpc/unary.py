"""Unary calls: one stream, one signed request, one signed answer, a deadline, coded errors.

The request names its method as the message's kind, carries a nonce that the answer repeats, and the caller's remaining
budget; an error answer has kind `error`. A handler's exception becomes a coded error: never a traceback to the peer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from overlay.errors import Blame, ConnectionLost, PeerdError, ProtocolViolation, StreamReset, TimedOut
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc import limits
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message
from overlay.stream import Priority, Stream

log = logging.getLogger(__name__)

Handler = Callable[[PeerId, Message], Awaitable[Message]]
ERROR_KIND = "error"


class RemoteError(PeerdError):
    """The peer answered with an error; ``code`` is the peer's."""

    exit_code = 37
    http_status = 502
    blame = Blame.PEER

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


def error_header(
    code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None
) -> dict[str, Any]:
    """The fields of an error answer."""
    return {
        "code": code,
        "message": message[: limits.TEXT_CHARS_MAX],
        "retryable": retryable,
        "retry_after_s": retry_after_s,
    }


def serve_unary(
    host: Host,
    protocol: str,
    methods: Mapping[str, Handler],
    *,
    priority: Priority = Priority.CONTROL,
    message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    written: Callable[[Stream, Message], Awaitable[None]] | None = None,
) -> None:
    """Answer calls of ``protocol``; at most `CALLS_PER_PEER_MAX` at once from one peer.

    ``written`` is called with each answer in the same turn of the loop in which its handler returned, and may see it arrive.
    """

    async def handle(stream: Stream) -> None:
        channel = MessageChannel(stream, host.identity, message_bytes_max=message_bytes_max)
        request = await channel.receive()
        nonce = request.header.get("nonce")
        if not isinstance(nonce, bytes) or len(nonce) != limits.NONCE_BYTES:
            raise ProtocolViolation("A peer called without a nonce.")
        budget_ms = request.header.get("budget_ms")
        budget_s = (
            budget_ms / 1000 if isinstance(budget_ms, int) and 0 < budget_ms < 3_600_000 else limits.CALL_TIMEOUT_S
        )
        answer = await _answer(methods.get(request.kind), stream.remote_peer, request, budget_s)
        fresh = Message(answer.kind, {**answer.header, "nonce": nonce}, answer.parts)
        channel.send(fresh, end=True, close=True)
        if written is not None:
            await written(stream, answer)
        await stream.drain()

    host.serve(protocol, handle, max_inbound_per_peer=limits.CALLS_PER_PEER_MAX, priority=priority)


async def _answer(handler: Handler | None, peer: PeerId, request: Message, budget_s: float) -> Message:
    if handler is None:
        return Message(ERROR_KIND, error_header("unknown-method", f"There is no method {request.kind!r} here."))
    try:
        async with asyncio.timeout(budget_s):
            return await handler(peer, request)
    except TimeoutError:
        return Message(
            ERROR_KIND, error_header("timed-out", "The answer took longer than the caller waits.", retryable=True)
        )
    except PeerdError as error:
        return Message(ERROR_KIND, error_header(error.code, str(error), retryable=error.retryable))
    except Exception:
        log.exception("the method %s failed", request.kind)
        return Message(ERROR_KIND, error_header("internal", "The peer failed to answer; its log says why."))


async def call(
    host: Host,
    peer: PeerId,
    protocol: str,
    message: Message,
    *,
    timeout_s: float = limits.CALL_TIMEOUT_S,
    addresses: Sequence[Multiaddr] = (),
    message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    priority: Priority = Priority.CONTROL,
) -> Message:
    """One call. Raises RemoteError, TimedOut, or the overlay's errors. Cancel-safe: the stream is reset.

    A call that was lost with a connection which the peer was leaving is made once more: handlers of unary calls bear being asked twice.
    """
    nonce = host.ports.randomness.token(limits.NONCE_BYTES)
    header = {**message.header, "nonce": nonce, "budget_ms": max(1, int(timeout_s * 1000))}
    question = Message(message.kind, header, message.parts, recipient=message.recipient)
    tries = 2
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                tries -= 1
                # Lazily: a peer that doesn't speak the protocol refuses, and has heard nothing of it.
                stream = await host.open_stream(
                    peer, protocol, addresses=addresses, priority=priority, timeout_s=None, lazily=True
                )
                try:
                    answer = await _ask(stream, host, question, message_bytes_max)
                    break
                except (ConnectionLost, StreamReset):
                    if not tries or not stream.connection.was_left:
                        raise
    except TimeoutError:
        raise TimedOut(f"{peer} did not answer {message.kind} within {timeout_s:.1f} s.") from None
    if answer.header.get("nonce") != nonce:
        raise ProtocolViolation("A peer answered another question than was asked.")
    if answer.kind == ERROR_KIND:
        raise _remote_error(answer.header)
    return answer


async def _ask(stream: Stream, host: Host, question: Message, message_bytes_max: int) -> Message:
    finished = False
    try:
        channel = MessageChannel(stream, host.identity, message_bytes_max=message_bytes_max)
        await channel.send_and_drain(question, end=True, close=True)
        answer = await channel.receive()
        finished = True
    finally:
        if not finished and stream.error is None:
            stream.reset("given-up")
    return answer


def _remote_error(header: Mapping[str, Any]) -> RemoteError:
    code, text = header.get("code"), header.get("message")
    retry_after_s = header.get("retry_after_s")
    return RemoteError(
        code[:64] if isinstance(code, str) else "unknown",
        text[: limits.TEXT_CHARS_MAX] if isinstance(text, str) else "The peer gave no reason.",
        retryable=header.get("retryable") is True,
        retry_after_s=float(retry_after_s) if isinstance(retry_after_s, int | float) else None,
    )
