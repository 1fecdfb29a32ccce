"""What hosts serve each other on real loopback sockets: how many streams at once, and what a handler's end does to its stream."""

from __future__ import annotations

import asyncio

import pytest

from overlay.errors import PeerdError, ProtocolRefused, StreamReset
from overlay.host import Host
from overlay.stream import Stream
from tests.overlay.network import echo, mute, run_hosts, until

ECHO = "/test/echo/1"
MUTE = "/test/mute/1"


def test_a_failing_handler_resets_its_stream_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(stream: Stream) -> None:
        await stream.read(1)
        raise RuntimeError("a bug")

    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo)
        two.serve("/test/fail/1", fail)
        stream = await one.open_stream(two.peer_id, "/test/fail/1", addresses=two.addresses)
        await stream.write(b"x")
        with pytest.raises(StreamReset):
            await stream.read()
        lively = await one.open_stream(two.peer_id, ECHO)
        await lively.write(b"y")
        assert await lively.read(1) == b"y"

    run_hosts(2, scene)
    assert "a bug" in caplog.text


async def use_another(one: Host, two: Host) -> None:
    extra = await one.open_stream(two.peer_id, MUTE)
    await extra.write(b"x")
    await extra.read()


def test_too_many_streams_of_one_protocol_are_reset() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(MUTE, mute, max_inbound_per_peer=3)
        streams = [await one.open_stream(two.peer_id, MUTE, addresses=two.addresses) for _ in range(3)]
        with pytest.raises(PeerdError):
            await use_another(one, two)
        assert all(stream.error is None for stream in streams)

    run_hosts(2, scene)


def test_a_place_is_free_again_when_its_handler_has_ended() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo, max_inbound_per_peer=1)
        for _ in range(3):
            stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
            await stream.write(b"x")
            await stream.close_write()
            assert await stream.read() == b"x"
            assert await stream.read() == b""
            await until(lambda: not two._services._inbound)

    run_hosts(2, scene)


def test_what_is_served_no_more_is_refused_and_what_runs_goes_on() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        await stream.write(b"x")
        assert await stream.read() == b"x"
        two.unserve(ECHO)
        assert ECHO not in two.served_protocols()
        await stream.write(b"y")
        assert await stream.read() == b"y"
        await until(lambda: ECHO not in one.protocols_of(two.peer_id))
        with pytest.raises(ProtocolRefused):
            await one.open_stream(two.peer_id, ECHO)

    run_hosts(2, scene)


def test_a_host_that_closes_cancels_its_handlers() -> None:
    ended = []

    async def wait(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(stream.protocol)

    async def scene(one: Host, two: Host) -> None:
        two.serve(MUTE, wait)
        stream = await one.open_stream(two.peer_id, MUTE, addresses=two.addresses)
        await stream.write(b"x")
        await until(lambda: bool(two._services._tasks))

    run_hosts(2, scene)
    assert ended == [MUTE]
