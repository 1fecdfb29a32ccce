"""What overtakes what on a connection: real hosts on loopback, with the socket held while queues fill."""

from __future__ import annotations

import pytest

from overlay import limits
from overlay.connection import Connection
from overlay.host import Host
from overlay.stream import Priority, Stream
from tests.overlay.network import run_hosts, until

SINK = "/test/sink/1"


class Order:
    """Which streams' bytes came, in order."""

    def __init__(self) -> None:
        self.came: list[tuple[int, int]] = []

    async def take(self, stream: Stream) -> None:
        while data := await stream.read(1 << 20):
            if self.came and self.came[-1][0] == stream.lane.id:
                data = bytes(self.came.pop()[1]) + data
            self.came.append((stream.lane.id, len(data)))

    def bytes_of(self, stream: Stream) -> int:
        return sum(count for lane, count in self.came if lane == stream.lane.id)


async def _streams(one: Host, two: Host, *priorities: Priority) -> tuple[Order, Connection, list[Stream]]:
    order = Order()
    two.serve(SINK, order.take)
    streams = [
        await one.open_stream(two.peer_id, SINK, addresses=two.addresses, priority=priority) for priority in priorities
    ]
    return order, streams[0].connection, streams


def test_a_prompt_on_a_stream_for_decoding_is_bulk_until_the_last_of_it_has_left() -> None:
    async def scene(one: Host, two: Host) -> None:
        order, connection, (prompt, token) = await _streams(one, two, Priority.DECODE, Priority.DECODE)
        connection.pause_writing()
        prompt.write_nowait(bytes(200 << 10))
        token.write_nowait(b"token")
        assert (prompt.rank, token.rank) == (Priority.BULK, Priority.DECODE)
        connection.resume_writing()
        await until(lambda: order.bytes_of(prompt) == 200 << 10)
        assert order.came[0] == (token.lane.id, 5)
        assert prompt.rank is Priority.DECODE

    run_hosts(2, scene)


def test_bulk_leaves_room_while_anything_urgent_was_sent_and_takes_it_all_otherwise() -> None:
    async def scene(one: Host, two: Host) -> None:
        order, connection, (bulk, token) = await _streams(one, two, Priority.BULK, Priority.DECODE)
        one.urgent.last_at = None
        await bulk.write(bytes(1 << 20))
        assert connection._outbox.pacer.base_s is None
        token.write_nowait(b"token")
        await bulk.write(bytes(4 << 20))
        await until(lambda: order.bytes_of(bulk) == 5 << 20)
        assert connection._outbox.pacer.base_s is not None

    run_hosts(2, scene)


def test_bulk_goes_on_to_a_peer_that_echoes_no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(one: Host, two: Host) -> None:
        order, _, (bulk, _) = await _streams(one, two, Priority.BULK, Priority.DECODE)
        one.urgent.last_at = one.ports.clock.now()
        monkeypatch.setattr(Connection, "mark_echoed", lambda _, number: None)
        bulk.write_nowait(bytes(1 << 20))
        assert bulk.outgoing
        one.urgent.last_at = one.ports.clock.now() - limits.URGENT_LIFE_S
        one.maintain(one.ports.clock.now())
        await until(lambda: order.bytes_of(bulk) == 1 << 20)

    run_hosts(2, scene)
