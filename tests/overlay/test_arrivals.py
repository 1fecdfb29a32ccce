"""What was written has been sent, and has arrived: two hosts on a link of the simulator, whose other end reads when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import cast

import pytest

from netsim.fabric import Path
from netsim.loop import run
from overlay import limits
from overlay.connection import ARRIVAL_BIT, Connection
from overlay.errors import ConnectionLost, ProtocolViolation, StreamReset
from overlay.host import Host
from overlay.multiaddr import tcp_address
from overlay.pacing import NUMBERS, Pacer
from overlay.stream import Priority, Stream
from overlay.yamux.session import INITIAL_WINDOW
from tests.netsim.small_network import Lines, SmallNetwork
from tests.overlay.network import echo, identity, mute

MUTE = "/test/mute/1"
ECHO = "/test/echo/1"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
DELAY_S = 0.05
ROUND_TRIP_S = 2 * DELAY_S


class Line:
    """A connection and its other end, whose application reads nothing of `MUTE`."""

    def __init__(self, network: SmallNetwork, near: Connection, far: Connection) -> None:
        self.network = network
        self.near = near
        self.far = far

    def hold(self) -> None:
        """The other end takes nothing from its socket until `let_go`."""
        self._far_socket().pause_reading()

    def let_go(self) -> None:
        self._far_socket().resume_reading()

    def _far_socket(self) -> asyncio.Transport:
        assert self.far._transport is not None
        return self.far._transport

    async def open(self, protocol: str = MUTE, priority: Priority = Priority.CONTROL) -> tuple[Stream, Stream]:
        """Both ends of a stream that is agreed on."""
        stream = self.near.open_stream(protocol, priority)
        await stream.wait_negotiated()
        return stream, cast(Stream, self.far.session.lanes[stream.lane.id].owner)


def on_a_line(scene: Callable[[Line], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(1000), AsyncExitStack() as stack:
            network = SmallNetwork(Lines(), Path(delay_s=DELAY_S))
            hosts = []
            for number, address in enumerate(ADDRESSES, 1):
                hosts.append(await stack.enter_async_context(Host(identity(number), network.ports(address))))
                await hosts[-1].listen(tcp_address(address, 4001))
                hosts[-1].serve(MUTE, mute)
                hosts[-1].serve(ECHO, echo)
            near = await hosts[0].connect(hosts[1].peer_id, hosts[1].addresses)
            await asyncio.sleep(1)
            far = hosts[1].connection(hosts[0].peer_id)
            assert far is not None
            await scene(Line(network, near, far))

    run(main())


async def begun(waiting: Awaitable[None]) -> asyncio.Task[None]:
    """A task that waits already."""

    async def wait() -> None:
        await waiting

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


# --- arrived ---


def test_what_was_written_has_arrived_when_the_peers_mux_has_read_it_whether_or_not_the_application_has() -> None:
    async def scene(line: Line) -> None:
        stream, far = await line.open()
        line.hold()
        stream.write_nowait(bytes(100 << 10))
        await stream.wait_sent()
        task = await begun(line.near.wait_arrived())
        await asyncio.sleep(10)
        assert (task.done(), far.unread_bytes) == (False, 0)
        line.let_go()
        await task
        assert far.unread_bytes == 100 << 10

    on_a_line(scene)


def test_on_a_free_way_it_takes_one_round_trip() -> None:
    async def scene(line: Line) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        await line.near.wait_arrived()
        assert now() - began == pytest.approx(ROUND_TRIP_S, abs=0.01)

    on_a_line(scene)


def test_who_waits_later_waits_for_what_was_written_later() -> None:
    async def scene(line: Line) -> None:
        first = await begun(line.near.wait_arrived())
        line.near.pause_writing()
        second = await begun(line.near.wait_arrived())
        await asyncio.sleep(1)
        assert (first.done(), second.done()) == (True, False)
        line.near.resume_writing()
        await second

    on_a_line(scene)


def test_somebody_waits_until_all_who_did_have_what_they_waited_for() -> None:
    async def scene(line: Line) -> None:
        assert not line.near.is_awaited
        first = await begun(line.near.wait_arrived())
        line.near.pause_writing()
        second = await begun(line.near.wait_arrived())
        await first
        assert line.near.is_awaited
        line.near.resume_writing()
        await second
        assert not line.near.is_awaited

    on_a_line(scene)


@pytest.mark.parametrize(
    "end",
    [
        lambda line: line.near.close_nowait(),
        lambda line: line.near.abort(ConnectionLost("The peer fell silent.")),
        lambda line: line.far.close_nowait(),
        lambda line: line.network.cut(*ADDRESSES),
    ],
    ids=["closed here", "dropped here", "closed there", "cut"],
)
def test_who_waits_hears_that_the_connection_was_lost(end: Callable[[Line], None]) -> None:
    async def scene(line: Line) -> None:
        line.hold()
        task = await begun(line.near.wait_arrived())
        await asyncio.sleep(1)
        end(line)
        with pytest.raises(ConnectionLost):
            await task
        assert not line.near.is_awaited

    on_a_line(scene)


def test_nothing_arrives_on_a_connection_that_was_lost_before() -> None:
    async def scene(line: Line) -> None:
        line.near.close_nowait()
        with pytest.raises(ConnectionLost):
            await line.near.wait_arrived()
        assert not line.near.is_awaited

    on_a_line(scene)


def test_of_a_connection_that_the_peer_broke_is_heard_that_it_was_lost() -> None:
    async def scene(line: Line) -> None:
        line.near._violated(ProtocolViolation("A peer sent nonsense."))
        with pytest.raises(ConnectionLost):
            await line.near.wait_arrived()

    on_a_line(scene)


def test_who_gives_up_waiting_leaves_nothing_behind_and_its_echo_wakes_nobody() -> None:
    async def scene(line: Line) -> None:
        line.hold()
        given_up = await begun(line.near.wait_arrived())
        await asyncio.sleep(1)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert given_up.cancelled()
        assert not line.near.is_awaited
        line.near.pause_writing()
        other = await begun(line.near.wait_arrived())
        line.let_go()
        await asyncio.sleep(1)
        assert not other.done()
        line.near.resume_writing()
        await other

    on_a_line(scene)


def test_who_gives_up_in_the_turn_in_which_the_connection_is_lost_has_given_up() -> None:
    async def scene(line: Line) -> None:
        line.hold()
        first, second = [await begun(line.near.wait_arrived()) for _ in range(2)]
        first.cancel()
        line.near.close_nowait()
        second.cancel()
        await asyncio.wait([first, second])
        assert (first.cancelled(), second.cancelled()) == (True, True)

    on_a_line(scene)


def test_an_echo_that_comes_in_the_turn_in_which_its_waiter_gives_up_wakes_nobody() -> None:
    async def scene(line: Line) -> None:
        line.hold()
        task = await begun(line.near.wait_arrived())
        task.cancel()
        line.near.mark_echoed(ARRIVAL_BIT | line.near._last_arrival)
        await asyncio.wait([task])
        assert task.cancelled()

    on_a_line(scene)


def test_an_echo_of_a_number_that_nobody_waits_for_changes_nothing() -> None:
    async def scene(line: Line) -> None:
        line.near.mark_echoed(ARRIVAL_BIT | 1)
        line.hold()
        task = await begun(line.near.wait_arrived())
        for number in (0, 1, 2, 3, NUMBERS):
            if number != line.near._last_arrival:
                line.near.mark_echoed(ARRIVAL_BIT | number)
        await asyncio.sleep(1)
        assert not task.done()
        assert line.near.is_awaited
        line.let_go()
        await task
        line.near.mark_echoed(ARRIVAL_BIT | line.near._last_arrival)
        assert line.near.error is None

    on_a_line(scene)


def test_an_echo_that_comes_twice_in_one_turn_counts_once() -> None:
    async def scene(line: Line) -> None:
        line.hold()
        task = await begun(line.near.wait_arrived())
        for _ in range(2):
            line.near.mark_echoed(ARRIVAL_BIT | line.near._last_arrival)
        await task
        assert line.near.error is None

    on_a_line(scene)


# --- numbers ---


def test_the_numbers_of_those_that_wait_begin_anew_after_the_last_one() -> None:
    async def scene(line: Line) -> None:
        line.near._last_arrival = ARRIVAL_BIT - 2
        tasks = [await begun(line.near.wait_arrived()) for _ in range(4)]
        await asyncio.gather(*tasks)
        assert line.near._last_arrival == 2

    on_a_line(scene)


def test_the_pacers_numbers_never_have_the_bit_of_those_that_are_waited_for() -> None:
    pacer = Pacer()
    pacer._next_number = NUMBERS - 2
    numbers = [pacer.mark(position, 100.0) for position in range(5)]
    assert numbers == [NUMBERS - 1, NUMBERS, 0, 1, 2]
    assert [number for number in numbers if number & ARRIVAL_BIT] == []


def test_marks_that_are_waited_for_never_reach_the_pacer(monkeypatch: pytest.MonkeyPatch) -> None:
    paced: list[int] = []
    echoed = Pacer.echoed

    def noted(pacer: Pacer, number: int, position: int, now: float) -> None:
        paced.append(number)
        echoed(pacer, number, position, now)

    monkeypatch.setattr(Pacer, "echoed", noted)

    async def scene(line: Line) -> None:
        (bulk, _), (token, _) = await line.open(MUTE, Priority.BULK), await line.open(MUTE, Priority.DECODE)
        token.write_nowait(b"token")
        bulk.write_nowait(bytes(100 << 10))
        await line.near.wait_arrived()
        await bulk.wait_sent()
        await line.near.wait_arrived()
        assert paced, "bulk beside something urgent is paced"
        assert [number for number in paced if number & ARRIVAL_BIT] == []

    on_a_line(scene)


# --- sent ---


def test_all_is_sent_when_nothing_waits_any_more_and_not_when_little_does() -> None:
    async def scene(line: Line) -> None:
        stream, far = await line.open()
        stream.write_nowait(bytes(INITIAL_WINDOW + 1))
        task = await begun(stream.wait_sent())
        await asyncio.sleep(10)
        assert 0 < stream.outgoing_bytes < limits.STREAM_WRITE_HIGH_WATER_BYTES
        assert not task.done()
        while far.unread_bytes:
            await far.read()
        await task
        assert not stream.outgoing

    on_a_line(scene)


def test_where_nothing_was_written_all_is_sent() -> None:
    async def scene(line: Line) -> None:
        stream, _ = await line.open()
        assert (await begun(stream.wait_sent())).done()

    on_a_line(scene)


def test_what_is_written_while_somebody_waits_is_waited_for_too() -> None:
    async def scene(line: Line) -> None:
        stream, _ = await line.open()
        line.near.pause_writing()
        stream.write_nowait(b"first")
        task = await begun(stream.wait_sent())
        line.near.resume_writing()
        line.near.pause_writing()
        stream.write_nowait(b"second")
        await asyncio.sleep(1)
        assert not task.done()
        line.near.resume_writing()
        await task

    on_a_line(scene)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda line, far: far.reset(), StreamReset),
        (lambda line, far: line.near.close_nowait(), ConnectionLost),
        (lambda line, far: line.network.cut(*ADDRESSES), ConnectionLost),
    ],
    ids=["reset there", "closed here", "cut"],
)
def test_who_waits_for_the_socket_hears_of_the_streams_end(
    end: Callable[[Line, Stream], None], error: type[Exception]
) -> None:
    async def scene(line: Line) -> None:
        stream, far = await line.open()
        stream.write_nowait(bytes(INITIAL_WINDOW + 1))
        task = await begun(stream.wait_sent())
        await asyncio.sleep(1)
        end(line, far)
        with pytest.raises(error):
            await task

    on_a_line(scene)


def test_who_gives_up_waiting_for_the_socket_leaves_the_stream_as_it_is() -> None:
    async def scene(line: Line) -> None:
        stream, _ = await line.open(ECHO)
        line.near.pause_writing()
        stream.write_nowait(b"said")
        task = await begun(stream.wait_sent())
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        line.near.resume_writing()
        assert await stream.read_exactly(4) == b"said"

    on_a_line(scene)
