"""Channels and unary calls over real hosts: order, names, signatures, deadlines and errors."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from overlay.errors import Blame, LimitExceeded, PeerdError, ProtocolViolation, StreamReset, TimedOut
from overlay.host import Host
from overlay.identity import PeerId
from overlay.rpc.channel import MessageChannel
from overlay.rpc.frame import encode_frame, encode_header
from overlay.rpc.signing import sign
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import RemoteError, call, serve_unary
from overlay.stream import Stream
from tests.overlay.network import identity, run_hosts

TALK = "/test/talk/1"
CALLS = "/test/calls/1"


async def repeat(channel: MessageChannel) -> None:
    while True:
        message = await channel.receive()
        channel.send(Message(message.kind, {"n": message.header["n"]}, message.parts))


def serve_talk(host: Host) -> None:
    async def handle(stream: Stream) -> None:
        await repeat(MessageChannel(stream, host.identity))

    host.serve(TALK, handle)


def test_messages_come_in_order_with_their_tensors() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_talk(two)
        channel = MessageChannel(await one.open_stream(two.peer_id, TALK, addresses=two.addresses), one.identity)
        parts = (Part("hidden", "float32", (256, 256), bytes(range(256)) * 1024),)
        for number in range(20):
            channel.send(Message("window", {"n": number}, parts))
        for number in range(20):
            answer = await channel.receive()
            assert answer.header["n"] == number
            assert bytes(answer.parts[0].data) == parts[0].data
            assert channel.verify(answer)
        assert (channel.statistics.sent, channel.statistics.received) == (20, 20)

    run_hosts(2, scene)


def forged(host: Host, peer: PeerId, **changes: object) -> list[bytes]:
    """A frame with one thing wrong."""
    message = Message("window", {"n": 1})
    sender = changes.get("sender", host.peer_id.multihash)
    recipient = changes.get("recipient", peer.multihash)
    header = encode_header(message, sender, recipient)  # type: ignore[arg-type]
    signature = bytes(64) if changes.get("bad_signature") else sign(host.identity, header, ())
    buffers = encode_frame(header, (), int(changes.get("sequence", 0)), None if changes.get("unsigned") else signature)  # type: ignore[call-overload]
    return [bytes(buffer) for buffer in buffers]


@pytest.mark.parametrize("changes", [
    {"sequence": 1}, {"unsigned": True}, {"bad_signature": True}, {"sender": identity(9).peer_id.multihash},
    {"recipient": identity(9).peer_id.multihash},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_a_message_that_is_not_what_it_should_be_ends_the_stream(changes: dict[str, object]) -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_talk(two)
        stream = await one.open_stream(two.peer_id, TALK, addresses=two.addresses)
        await stream.write(*forged(one, two.peer_id, **changes))
        with pytest.raises(StreamReset):
            await stream.read()
        fine = MessageChannel(await one.open_stream(two.peer_id, TALK), one.identity)
        fine.send(Message("window", {"n": 3}))
        assert (await fine.receive()).header["n"] == 3

    run_hosts(2, scene)


def test_an_end_in_the_middle_of_a_message_is_a_violation() -> None:
    seen: list[PeerdError | None] = []

    class Ears:
        def message_received(self, message: Message) -> None:
            raise AssertionError

        def channel_lost(self, error: PeerdError | None) -> None:
            seen.append(error)

    async def scene(one: Host, two: Host) -> None:
        lost = asyncio.Event()

        async def handle(stream: Stream) -> None:
            MessageChannel(stream, two.identity).set_receiver(Ears())
            await lost.wait()

        two.serve(TALK, handle)
        stream = await one.open_stream(two.peer_id, TALK, addresses=two.addresses)
        await stream.write(forged(one, two.peer_id)[0][:30])
        await stream.close_write()
        async with asyncio.timeout(5):
            while not seen:
                await asyncio.sleep(0.005)
        lost.set()
        assert isinstance(seen[0], ProtocolViolation)

    run_hosts(2, scene)


async def add(peer: PeerId, message: Message) -> Message:
    return Message("sum", {"sum": sum(message.header["numbers"])}, message.parts)


async def hang(peer: PeerId, message: Message) -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def refuse(peer: PeerId, message: Message) -> Message:
    raise LimitExceeded("No room here; ask another.")


async def break_down(peer: PeerId, message: Message) -> Message:
    raise KeyError("a bug")


async def impersonate(peer: PeerId, message: Message) -> Message:
    return replace(message, kind="sum")


METHODS = {"add": add, "hang": hang, "refuse": refuse, "break": break_down, "echo": impersonate}


def test_a_call_is_answered_with_its_tensors() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_unary(two, CALLS, METHODS)
        part = Part("x", "uint8", (3,), b"abc")
        request = Message("add", {"numbers": [1, 2, 3]}, (part,))
        for _ in range(3):
            answer = await call(one, two.peer_id, CALLS, request, addresses=two.addresses)
            assert (answer.header["sum"], bytes(answer.parts[0].data)) == (6, b"abc")
        connection = one.connection(two.peer_id)
        assert connection is not None
        echoed = await call(one, two.peer_id, CALLS, Message("echo", {"numbers": []}))
        assert echoed.sender == two.peer_id.multihash, "an answer is signed by who answers, whatever it repeats"

    run_hosts(2, scene)


@pytest.mark.parametrize(("method", "code"), [("refuse", "limit"), ("break", "internal"), ("nope", "unknown-method")])
def test_errors_have_codes_and_no_tracebacks(method: str, code: str) -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_unary(two, CALLS, METHODS)
        with pytest.raises(RemoteError) as caught:
            await call(one, two.peer_id, CALLS, Message(method, {}), addresses=two.addresses)
        assert caught.value.code == code
        assert caught.value.blame is Blame.PEER
        assert "a bug" not in str(caught.value)

    run_hosts(2, scene)


def test_a_call_that_takes_too_long_ends_at_its_deadline_and_frees_its_stream() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_unary(two, CALLS, METHODS)
        await call(one, two.peer_id, CALLS, Message("add", {"numbers": []}), addresses=two.addresses)
        with pytest.raises((TimedOut, RemoteError)):
            await call(one, two.peer_id, CALLS, Message("hang", {}), timeout_s=0.2)
        connection = one.connection(two.peer_id)
        assert connection is not None
        async with asyncio.timeout(5):
            while connection.session.lanes:
                await asyncio.sleep(0.01)

    run_hosts(2, scene)
