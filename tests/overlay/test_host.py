"""Hosts on real loopback sockets: streams both ways, ends of every kind, strangers and garbage."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref

import pytest

from overlay import limits
from overlay.connection import Connection
from overlay.errors import (
    ConnectionLost,
    DialError,
    ProtocolRefused,
    StreamClosed,
    StreamReset,
    UpgradeError,
)
from overlay.host import Host, HostConfig
from overlay.identify import IDENTIFY
from overlay.multiaddr import Multiaddr
from overlay.ping import PING
from overlay.stream import Stream
from overlay.yamux.session import INITIAL_WINDOW
from tests.overlay.network import echo, identity, mute, run_hosts, until

ECHO = "/test/echo/1"
SINK = "/test/sink/1"
MUTE = "/test/mute/1"
NEGOTIATION_BYTES_AT_MOST = 100


async def sink(stream: Stream) -> None:
    total = 0
    while data := await stream.read():
        total += len(data)
    await stream.write(total.to_bytes(8, "big"))
    await stream.close_write()


def serve_all(*hosts: Host) -> None:
    for host in hosts:
        host.serve(ECHO, echo)
        host.serve(SINK, sink)
        host.serve(MUTE, mute)


def test_what_is_written_comes_back_and_an_answer_may_follow_our_end() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, SINK, addresses=two.addresses)
        await stream.write(bytes(100_000), bytes(23))
        await stream.close_write()
        assert int.from_bytes(await stream.read_exactly(8), "big") == 100_023
        assert await stream.read() == b""

    run_hosts(2, scene)


def test_both_sides_writing_eight_mebibytes_on_sixteen_streams_at_once_all_finish() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(one, two)
        data = os.urandom(1 << 20)

        async def exchange(host: Host, peer: Host) -> None:
            stream = await host.open_stream(peer.peer_id, ECHO, addresses=peer.addresses)

            async def write() -> None:
                for _ in range(8):
                    await stream.write(data)
                await stream.close_write()

            async def read() -> None:
                for _ in range(8):
                    assert await stream.read_exactly(len(data)) == data

            await asyncio.gather(write(), read())

        await asyncio.gather(*(exchange(*pair) for _ in range(8) for pair in ((one, two), (two, one))))

    run_hosts(2, scene, timeout_s=60)


def test_a_peer_that_never_reads_blocks_its_own_stream_only() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stuck = await one.open_stream(two.peer_id, MUTE, addresses=two.addresses)
        writing = asyncio.get_running_loop().create_task(stuck.write(bytes(40 << 20)))
        lively = await one.open_stream(two.peer_id, ECHO)
        for _ in range(20):
            await lively.write(b"x" * 1000)
            assert await lively.read_exactly(1000) == b"x" * 1000
        assert not writing.done()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        with pytest.raises(StreamReset):
            await stuck.read()

    run_hosts(2, scene)


def test_identify_tells_protocols_and_simultaneous_dials_end_with_one_connection_each() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        await asyncio.gather(one.connect(two.peer_id, two.addresses), two.connect(one.peer_id, one.addresses))
        assert ECHO not in one.protocols_of(two.peer_id)
        (await one.open_stream(two.peer_id, PING)).reset()
        await until(lambda: ECHO in one.protocols_of(two.peer_id))
        initiators = {
            host.peer_id if not connection.is_inbound else connection.remote_peer
            for host, peer in ((one, two), (two, one))
            if (connection := host.connection(peer.peer_id)) is not None
        }
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.write(b"still here")
        assert await stream.read_exactly(10) == b"still here"
        assert len(initiators) == 1

    run_hosts(2, scene)


def test_a_service_that_comes_later_is_pushed() -> None:
    async def scene(one: Host, two: Host) -> None:
        stream = await one.open_stream(two.peer_id, PING, addresses=two.addresses)
        await until(lambda: PING in one.protocols_of(two.peer_id))
        stream.reset()
        serve_all(two)
        await until(lambda: ECHO in one.protocols_of(two.peer_id))

    run_hosts(2, scene)


def test_a_change_is_pushed_to_none_that_connected_after_it() -> None:
    def pushes(host: Host) -> int:
        host.maintain(host.ports.clock.now())
        return sum(task.get_name().startswith("identify push") for task in asyncio.all_tasks())

    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        await one.connect(two.peer_id, two.addresses)
        await until(lambda: two.connection(one.peer_id) is not None)
        assert pushes(two) == 0
        two.unserve(ECHO)
        assert pushes(two) == 1

    run_hosts(2, scene)


def test_who_dialled_us_is_asked_when_the_connection_turns_out_to_last_and_not_for_one_question() -> None:
    async def scene(one: Host, two: Host) -> None:
        await one.connect(two.peer_id, two.addresses)
        await until(lambda: two.connection(one.peer_id) is not None)
        asking = asyncio.all_tasks()
        two.maintain(two.ports.clock.now())
        assert asyncio.all_tasks() == asking
        with two.keep(one.peer_id):
            two.maintain(two.ports.clock.now())
            await until(lambda: PING in two.protocols_of(one.peer_id))
        assert not one.protocols_of(two.peer_id)

    run_hosts(2, scene)


def test_a_peer_that_doesn_t_say_who_it_is_is_asked_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    async def silent(stream: Stream) -> None:
        asked.append(0.0)
        stream.reset()

    async def scene(one: Host, two: Host) -> None:
        one.serve(IDENTIFY, silent)
        await one.connect(two.peer_id, two.addresses)
        await until(lambda: two.connection(one.peer_id) is not None)
        with two.keep(one.peer_id):
            for _ in range(3):
                two.maintain(two.ports.clock.now())
                await until(lambda: not any(task.get_name().startswith("identify") for task in asyncio.all_tasks()))
            assert len(asked) == 1
            monkeypatch.setattr(limits, "IDENTIFY_RETRY_S", 0.0)
            two.maintain(two.ports.clock.now())
            await until(lambda: len(asked) == 2)

    run_hosts(2, scene)


def test_pings_are_answered() -> None:
    async def scene(one: Host, two: Host) -> None:
        stream = await one.open_stream(two.peer_id, PING, addresses=two.addresses)
        for _ in range(3):
            nonce = os.urandom(32)
            await stream.write(nonce)
            assert await stream.read_exactly(32) == nonce
        await stream.close_write()
        assert await stream.read() == b""

    run_hosts(2, scene)


def test_an_unknown_protocol_is_refused_in_words() -> None:
    async def scene(one: Host, two: Host) -> None:
        with pytest.raises(ProtocolRefused, match="/nobody/1"):
            await one.open_stream(two.peer_id, "/nobody/1", addresses=two.addresses)

    run_hosts(2, scene)


def test_the_wrong_peer_a_dead_address_and_ourselves_are_refused() -> None:
    async def scene(one: Host, two: Host) -> None:
        where = two.addresses[0].without_peer()
        with pytest.raises(UpgradeError, match="somebody else"):
            await one.connect(identity(9).peer_id, (where,))
        with pytest.raises(DialError):
            await one.connect(identity(8).peer_id, (Multiaddr.parse("/ip4/127.0.0.1/tcp/1"),))
        with pytest.raises(DialError):
            await one.connect(one.peer_id, one.addresses)
        with pytest.raises(DialError):
            await one.connect(identity(7).peer_id)

    run_hosts(2, scene)


def test_hosts_of_two_private_networks_do_not_meet() -> None:
    async def scene(one: Host, two: Host) -> None:
        with pytest.raises(UpgradeError):
            await one.connect(two.peer_id, two.addresses)

    run_hosts(2, scene, configs={1: HostConfig(network_secret=b"a" * 32), 2: HostConfig(network_secret=b"b" * 32)})


def test_everything_that_waits_wakes_when_the_connection_dies() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        reading = await one.open_stream(two.peer_id, MUTE, addresses=two.addresses)
        writing = await one.open_stream(two.peer_id, MUTE)
        loop = asyncio.get_running_loop()
        waiting = [loop.create_task(reading.read()), loop.create_task(writing.write(bytes(40 << 20)))]
        await until(lambda: one.connection(two.peer_id) is not None)
        await asyncio.sleep(0)
        connection = one.connection(two.peer_id)
        assert connection is not None
        connection.abort(ConnectionLost("pulled the plug"))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ConnectionLost, ConnectionLost]
        again = await one.open_stream(two.peer_id, ECHO)
        await again.write(b"anew")
        assert await again.read_exactly(4) == b"anew"

    run_hosts(2, scene)


def test_a_stream_that_ends_early_says_so() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        await stream.write(b"abc")
        await stream.close_write()
        with pytest.raises(StreamClosed):
            await stream.read_exactly(4)

    run_hosts(2, scene)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(4096), os.urandom(4096), b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(4000)],
)
def test_garbage_on_the_port_ends_that_connection_and_the_host_lives(junk: bytes) -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        where = two.addresses[0]
        reader, writer = await asyncio.open_connection(where.host, where.port)
        writer.write(junk)
        await writer.drain()
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        await stream.write(b"alive")
        assert await stream.read_exactly(5) == b"alive"

    run_hosts(2, scene)


def test_junk_inside_the_secured_connection_ends_it_with_a_reason() -> None:
    async def scene(one: Host, two: Host) -> None:
        connection = await one.connect(two.peer_id, two.addresses)
        assert connection._sender is not None
        assert connection._transport is not None
        connection._transport.write(connection._sender.seal_framed(b"\xff" * 64))
        await connection.wait_closed()
        assert connection.error is not None
        again = await one.connect(two.peer_id, two.addresses)
        assert again.is_open

    run_hosts(2, scene)


def test_a_handshake_that_takes_too_long_is_dropped() -> None:
    async def scene(one: Host, two: Host) -> None:
        where = two.addresses[0]
        reader, writer = await asyncio.open_connection(where.host, where.port)
        await until(lambda: len(two._upgrading) == 1)
        now = two.ports.clock.now()
        two.maintain(now + limits.UPGRADE_TIMEOUT_S + 1)
        assert two._upgrading == {}
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()

    run_hosts(2, scene)


def test_a_silent_connection_is_pinged_and_then_given_up() -> None:
    async def scene(one: Host, two: Host) -> None:
        connection = await one.connect(two.peer_id, two.addresses)
        one.keep(two.peer_id)
        now = one.ports.clock.now()
        one.maintain(now + limits.PING_IDLE_S + 1)
        assert connection.session.ping_sent_at is not None
        one.maintain(connection.last_received + limits.SILENT_DEAD_S + 1)
        assert isinstance(connection.error, ConnectionLost)

    run_hosts(2, scene)


def test_a_closed_host_leaves_no_socket_behind() -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        await stream.write(b"x")
        assert isinstance(one.connection(two.peer_id), Connection)

    run_hosts(2, scene)
    before = open_files()
    run_hosts(2, scene)
    assert open_files() <= before


class Failing:
    """A receiver that can't cope."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.lost: list[Exception] = []

    def data_received(self, data: memoryview) -> None:
        raise self._error

    def eof_received(self) -> None:
        """Never heard."""

    def stream_lost(self, error: Exception) -> None:
        self.lost.append(error)


@pytest.mark.parametrize("error", [ConnectionLost("Another peer's connection broke."), ValueError("a bug")])
@pytest.mark.parametrize("buffered", [False, True])
def test_a_failing_receiver_loses_its_stream_and_not_the_connection(
    error: Exception, buffered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        healthy = await one.open_stream(two.peer_id, ECHO)
        receiver = Failing(error)
        if not buffered:
            stream.set_receiver(receiver)
        await stream.write(b"x")
        if buffered:
            await until(lambda: bool(stream._received))
            stream.set_receiver(receiver)
        await until(lambda: bool(receiver.lost))
        assert len(receiver.lost) == 1
        await healthy.write(b"y")
        assert await healthy.read_exactly(1) == b"y"

    run_hosts(2, scene)


def test_a_peer_that_filled_the_window_of_a_stream_closed_here_is_reset_not_left_waiting() -> None:
    async def scene(one: Host, two: Host) -> None:
        filled: list[bool] = []

        async def never_reads(stream: Stream) -> None:
            await until(lambda: stream._received_bytes > INITIAL_WINDOW - NEGOTIATION_BYTES_AT_MOST)
            filled.append(True)

        two.serve(MUTE, never_reads)
        stream = await one.open_stream(two.peer_id, MUTE, addresses=two.addresses)
        with pytest.raises(StreamReset):
            await stream.write(bytes(8 << 20))
        assert filled == [True]

    run_hosts(2, scene, timeout_s=10)


def test_streams_that_agree_on_nothing_and_streams_never_ended_are_reset_in_time() -> None:
    async def scene(one: Host, two: Host) -> None:
        async def leaves_at_once(stream: Stream) -> None:
            """The stream is closed when this returns."""

        two.serve(MUTE, leaves_at_once)
        connection = await one.connect(two.peer_id, two.addresses)
        kept_open = await one.open_stream(two.peer_id, MUTE)
        assert await kept_open.read() == b""
        connection.session.open()
        connection.pump()
        other = two.connection(one.peer_id)
        assert other is not None
        await until(lambda: other.unnegotiated == 1)
        now = two.ports.clock.now()
        two.maintain(now + limits.NEGOTIATE_TIMEOUT_S + 1)
        assert other.unnegotiated == 0
        assert kept_open.error is None
        two.maintain(now + limits.STREAM_LINGER_S + 5)
        await until(lambda: kept_open.error is not None)

    run_hosts(2, scene)


def test_a_byte_at_a_time_costs_the_receiver_no_object_a_byte() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, MUTE, addresses=two.addresses)
        other = two.connection(one.peer_id)
        assert other is not None
        await until(lambda: any(lane.owner.protocol == MUTE for lane in other.session.lanes.values()))  # type: ignore[attr-defined]
        received = next(lane.owner for lane in other.session.lanes.values() if lane.owner.protocol == MUTE)  # type: ignore[attr-defined]
        assert isinstance(received, Stream)
        for byte in range(256):
            received.data_received(memoryview(bytes([byte])))
        assert len(received._received) == 1
        assert await received.read_exactly(256) == bytes(range(256))
        assert stream.error is None

    run_hosts(2, scene)


def test_more_control_frames_than_a_message_holds_do_not_hold_up_the_data_behind_them() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        connection = stream.connection
        connection._uplink.bytes_per_s = 1.0
        connection._blocked = True
        for _ in range(200):
            connection.session.reset(connection.session.open())
        await stream.write(b"behind")
        connection.resume_writing()
        assert not stream.outgoing
        assert await stream.read_exactly(6) == b"behind"

    run_hosts(2, scene)


def test_a_stream_that_has_ended_is_freed_without_the_collector() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(two)
        stream = await one.open_stream(two.peer_id, ECHO, addresses=two.addresses)
        await stream.write(b"once")
        assert await stream.read_exactly(4) == b"once"
        await stream.close()
        left, lane = weakref.ref(stream), stream.lane
        await until(lambda: not lane.can_receive)
        gc.disable()
        try:
            del stream
            await asyncio.sleep(0)
            assert left() is None
        finally:
            gc.enable()

    run_hosts(2, scene)


def test_one_peer_holds_few_connections_however_many_it_dials() -> None:
    async def scene(one: Host, two: Host) -> None:
        serve_all(one)
        for _ in range(limits.DUPLICATES_PER_PEER + 5):
            two._connections.pop(one.peer_id, None)
            await two.connect(one.peer_id, one.addresses)
            await two.open_stream(one.peer_id, MUTE)
        await until(lambda: len(one._draining) <= limits.DUPLICATES_PER_PEER)
        assert len(one._draining) == limits.DUPLICATES_PER_PEER

    run_hosts(2, scene)
