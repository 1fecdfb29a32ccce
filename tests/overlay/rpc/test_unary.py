"""What who serves calls hears of its own answers: real hosts on loopback."""

from __future__ import annotations

import asyncio

import pytest

from overlay.errors import LimitExceeded
from overlay.host import Host
from overlay.identity import PeerId
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import RemoteError, call, serve_unary
from overlay.stream import Stream
from tests.overlay.network import run_hosts

CALLS = "/test/calls/1"


class Turns:
    """What happened, with a mark where the turn of the loop in which a handler returned was over."""

    def __init__(self) -> None:
        self.story: list[str] = []

    async def give(self, peer: PeerId, message: Message) -> Message:
        self._returns()
        return Message("given", {"n": message.header["n"]})

    async def refuse(self, peer: PeerId, message: Message) -> Message:
        self._returns()
        raise LimitExceeded("No room here; ask another.")

    async def written(self, stream: Stream, answer: Message) -> None:
        self.story.append(f"{answer.kind} {answer.header.get('n')} written to {stream.remote_peer}")

    def _returns(self) -> None:
        asyncio.get_running_loop().call_soon(self.story.append, "turn over")


def test_what_was_written_is_told_once_for_each_answer_in_the_turn_in_which_its_handler_returned() -> None:
    async def scene(one: Host, two: Host) -> None:
        turns = Turns()
        serve_unary(two, CALLS, {"give": turns.give}, written=turns.written)
        for number in range(3):
            await call(one, two.peer_id, CALLS, Message("give", {"n": number}), addresses=two.addresses)
            assert turns.story == [f"given {number} written to {one.peer_id}", "turn over"]
            turns.story.clear()

    run_hosts(2, scene)


def test_an_answer_that_is_an_error_is_told_as_any_other() -> None:
    async def scene(one: Host, two: Host) -> None:
        turns = Turns()
        serve_unary(two, CALLS, {"refuse": turns.refuse}, written=turns.written)
        with pytest.raises(RemoteError):
            await call(one, two.peer_id, CALLS, Message("refuse", {}), addresses=two.addresses)
        assert turns.story == [f"error None written to {one.peer_id}", "turn over"]

    run_hosts(2, scene)


def test_all_of_an_answer_is_queued_when_it_is_told_and_it_goes_out_while_somebody_sees_to_its_arrival() -> None:
    """The caller has it before whoever was told lets go of it."""
    part = Part("x", "uint8", (300_000,), bytes(300_000))
    queued: list[int] = []

    async def scene(one: Host, two: Host) -> None:
        is_read, has_arrived = asyncio.Event(), asyncio.Event()

        async def give(peer: PeerId, message: Message) -> Message:
            connection = two.connection(peer)
            assert connection is not None
            connection.pause_writing()
            return Message("given", {}, (part,))

        async def written(stream: Stream, answer: Message) -> None:
            queued.append(stream.outgoing_bytes)
            stream.connection.resume_writing()
            await is_read.wait()
            await stream.wait_sent()
            await stream.connection.wait_arrived()
            has_arrived.set()

        serve_unary(two, CALLS, {"give": give}, written=written)
        answer = await call(one, two.peer_id, CALLS, Message("give", {}), addresses=two.addresses)
        assert bytes(answer.parts[0].data) == part.data
        assert queued[0] >= 300_000
        is_read.set()
        await has_arrived.wait()

    run_hosts(2, scene)
