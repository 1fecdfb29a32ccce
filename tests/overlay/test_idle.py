"""Which connections are left, and that nobody is harmed when one is: pure cases, then real hosts on loopback."""

from __future__ import annotations

import asyncio

import pytest

from overlay import limits
from overlay.connection import Connection
from overlay.host import Host
from overlay.idle import ClosingLately, to_leave
from overlay.ping import PING
from overlay.rpc.types import Message
from overlay.rpc.unary import call, serve_unary
from overlay.stream import Stream
from tests.overlay.network import run_hosts, until

ECHO = "/test/echo/1"
ASK = "/test/ask/1"


async def echo(stream: Stream) -> None:
    while chunk := await stream.read():
        await stream.write(chunk)


async def joined(one: Host, two: Host) -> tuple[Connection, Connection]:
    """Both ends, used, quiet, and the one that was dialled knows who is there."""
    connection = await one.connect(two.peer_id, two.addresses)
    await until(lambda: two.connection(one.peer_id) is not None)
    other = two.connection(one.peer_id)
    assert other is not None
    await (await two.open_stream(one.peer_id, PING)).close()
    await until(lambda: bool(two.protocols_of(one.peer_id)))
    await until(lambda: not connection.session.lanes and not other.session.lanes)
    await until(lambda: connection.rtt_s is not None and other.rtt_s is not None)
    return connection, other


def test_what_was_quiet_for_long_is_left_and_what_was_used_lately_is_not() -> None:
    now = 1000.0
    assert to_leave([now - limits.CONNECTION_IDLE_S, now - 1.0], 0, now) == [0]


def test_over_the_limit_the_longest_quiet_are_left_first() -> None:
    now = 1000.0
    assert to_leave([now - 3, now - 5, now - 4], 2, now) == [1, 2]
    assert to_leave([now - 3, now - 5, now - 4], 0, now) == []


def test_over_the_limit_one_that_was_used_this_very_moment_is_left_too_but_no_more_than_it_takes() -> None:
    now = 1000.0
    assert to_leave([now, now - 0.1, now - 0.2], 2, now) == [2, 1]
    assert to_leave([now], 50, now) == [0]


def test_those_that_close_count_as_many_as_they_were_of_late_not_as_they_are_in_a_burst() -> None:
    closing = ClosingLately()
    assert closing.count(0, 1000.0) == 0
    assert closing.count(20, 1000.0) == 0
    assert closing.count(20, 1000.1) == 2
    assert [closing.count(20, 1000.1 + seconds) for seconds in (1.0, 2.0, 10.0)] == [13, 18, 20]
    assert closing.count(0, 1060.0) == 0


def test_a_host_with_connections_that_close_holds_fewer_that_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(one: Host, two: Host, three: Host) -> None:
        one.serve(ECHO, echo)
        quiet, _ = await joined(one, two)
        closing, other = await joined(one, three)
        holding = other.open_stream(ECHO)
        await holding.write(b"x")
        await holding.read_exactly(1)
        now = one.ports.clock.now()
        one.maintain(now)
        monkeypatch.setattr(limits, "CONNECTIONS_EASY", 1)
        closing.leave()
        one.maintain(now)
        assert not quiet.was_left
        one.maintain(now + 10 * limits.CLOSING_LATELY_S)
        assert closing.is_open
        assert quiet.was_left

    run_hosts(3, scene)


def test_a_connection_that_was_just_dialled_is_not_left_however_many_are_open_and_once_used_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(one: Host, two: Host) -> None:
        monkeypatch.setattr(limits, "CONNECTIONS_EASY", 0)
        connection = await one.connect(two.peer_id, two.addresses)
        assert not connection.session.was_used
        one.maintain(connection.last_received)
        assert not connection.was_left
        stream = connection.open_stream(ECHO)
        one.maintain(connection.last_received)
        assert not connection.was_left
        stream.reset()
        one.maintain(connection.last_received)
        assert connection.was_left

    run_hosts(2, scene)


def test_a_connection_that_was_dialled_and_never_used_is_left_a_second_later_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(one: Host, two: Host) -> None:
        monkeypatch.setattr(limits, "CONNECTIONS_EASY", 0)
        connection = await one.connect(two.peer_id, two.addresses)
        one.maintain(connection.opened_at + limits.UNUSED_IDLE_S)
        assert connection.was_left

    run_hosts(2, scene)


def test_an_idle_connection_is_left_by_both_ends_and_its_round_trip_stays_known() -> None:
    async def scene(one: Host, two: Host) -> None:
        closed: list[Connection] = []
        two.add_connection_listener(lambda _: None, closed.append)
        connection, other = await joined(one, two)
        one.maintain(connection.last_received + limits.CONNECTION_IDLE_S)
        assert one.connection(two.peer_id) is None
        await until(lambda: other.error is not None and connection.error is not None)
        assert (connection.was_left, other.was_left, closed) == (True, True, [other])
        assert one.rtt_s(two.peer_id) == connection.rtt_s
        assert one.connections() == two.connections() == ()

    run_hosts(2, scene)


def test_a_connection_with_a_stream_or_one_that_is_kept_is_not_left() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo)
        connection, _ = await joined(one, two)
        with one.keep(two.peer_id), one.keep(two.peer_id):
            one.maintain(connection.last_received + limits.CONNECTION_IDLE_S)
            assert one.connection(two.peer_id) is connection
        await until(lambda: connection.session.ping_sent_at is None)
        stream = await one.open_stream(two.peer_id, ECHO)
        one.maintain(connection.last_received + limits.CONNECTION_IDLE_S)
        assert one.connection(two.peer_id) is connection
        await until(lambda: connection.session.ping_sent_at is None)
        await stream.close_write()
        assert await stream.read() == b""
        await until(lambda: not connection.session.lanes)
        one.maintain(connection.last_received + limits.CONNECTION_IDLE_S)
        assert one.connection(two.peer_id) is None

    run_hosts(2, scene)


def test_a_connection_whose_bytes_are_awaited_is_not_left_though_it_carries_no_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(one: Host, two: Host) -> None:
        monkeypatch.setattr(limits, "CONNECTIONS_EASY", 0)
        connection, other = await joined(one, two)
        assert other._transport is not None
        other._transport.pause_reading()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connection.wait_arrived())
            await asyncio.sleep(0)
            assert not connection.session.lanes
            one.maintain(connection.last_received)
            assert one.connection(two.peer_id) is connection
            other._transport.resume_reading()
        one.maintain(connection.last_received)
        assert one.connection(two.peer_id) is None

    run_hosts(2, scene)


def test_only_connections_in_use_or_kept_are_pinged() -> None:
    async def scene(one: Host, two: Host) -> None:
        connection, _ = await joined(one, two)
        one.maintain(connection.last_received + limits.PING_IDLE_S + 1)
        assert connection.session.ping_sent_at is None
        with one.keep(two.peer_id):
            one.maintain(connection.last_received + limits.PING_IDLE_S + 1)
            assert connection.session.ping_sent_at is not None

    run_hosts(2, scene)


def test_a_stream_that_crosses_the_go_away_is_served_to_its_end() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo)
        connection, other = await joined(one, two)
        crossing = connection.open_stream(ECHO)
        await crossing.write(b"under way")
        other.leave()
        assert two.connection(one.peer_id) is None
        assert await crossing.read_exactly(9) == b"under way"
        two.maintain(two.ports.clock.now() + limits.LEAVE_S + 1)
        await crossing.write(b"still")
        assert await crossing.read_exactly(5) == b"still"
        await crossing.close_write()
        assert await crossing.read() == b""
        await until(lambda: not other.session.lanes)
        two.maintain(two.ports.clock.now() + limits.LEAVE_S + 1)
        assert other.error is not None
        again = await one.open_stream(two.peer_id, ECHO)
        assert again.connection is not connection

    run_hosts(2, scene)


def test_who_goes_on_opening_streams_on_a_connection_that_was_left_is_refused() -> None:
    async def scene(one: Host, two: Host) -> None:
        two.serve(ECHO, echo)
        connection, other = await joined(one, two)
        holding = connection.open_stream(ECHO)
        await holding.write(b"x")
        await holding.read_exactly(1)
        other.leave()
        await until(lambda: connection.was_left)
        two.maintain(two.ports.clock.now() + limits.LEAVE_S + 1)
        connection.was_left, connection.session.remote_gone = False, False
        late = connection.open_stream(ECHO)
        await until(lambda: late.error is not None)
        assert holding.error is None

    run_hosts(2, scene)


def test_a_call_that_is_lost_with_a_connection_that_was_left_is_made_again_on_a_new_one() -> None:
    async def scene(one: Host, two: Host) -> None:
        asked: list[Connection] = []

        async def answer(stream: Stream) -> None:
            """The first time as a peer of another make may do: go away, and drop what had come."""
            asked.append(stream.connection)
            stream.connection.leave()
            stream.connection.close_nowait()
            serve_unary(two, ASK, {"ask": give})

        async def give(peer: object, message: Message) -> Message:
            return Message("given", {})

        two.serve(ASK, answer)
        connection, _ = await joined(one, two)
        assert (await call(one, two.peer_id, ASK, Message("ask", {}))).kind == "given"
        assert len(asked) == 1
        assert one.connection(two.peer_id) is not connection

    run_hosts(2, scene)


def test_a_peer_that_is_met_again_soon_is_not_asked_again_who_it_is() -> None:
    async def scene(one: Host, two: Host) -> None:
        connection, other = await joined(one, two)
        connection.leave()
        await until(lambda: other.error is not None)
        _, again = await joined(one, two)
        await asyncio.sleep(0)
        assert again.session._next_id == 4  # one stream of its own: the ping

    run_hosts(2, scene)


def test_who_became_idle_while_another_was_busy_is_left_when_its_time_is_over() -> None:
    async def scene(one: Host, two: Host, three: Host) -> None:
        quiet, _ = await joined(one, two)
        busy, _ = await joined(one, three)
        one.maintain(quiet.last_received + 1.0)
        busy.last_received = quiet.last_received + 20.0
        one.maintain(quiet.last_received + limits.CONNECTION_IDLE_S - 0.1)
        assert len(one.connections()) == 2
        one.maintain(quiet.last_received + limits.CONNECTION_IDLE_S)
        assert one.connections() == (busy,)
        one.maintain(busy.last_received + limits.CONNECTION_IDLE_S - 0.1)
        assert one.connections() == (busy,)
        one.maintain(busy.last_received + limits.CONNECTION_IDLE_S)
        assert one.connections() == ()

    run_hosts(3, scene)
