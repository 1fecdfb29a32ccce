"""In-memory links: order, time, bandwidth, cuts."""

from __future__ import annotations

import asyncio

import pytest

from netsim.link import LinkOptions, LinkPipe, Network, Trace
from netsim.loop import run
from overlay.errors import DialError
from overlay.multiaddr import tcp_address

A, B = "10.0.0.1", "10.0.0.2"


class Ear(asyncio.BufferedProtocol):
    """Keeps what it hears, and when."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.times: list[float] = []
        self.ended: list[Exception | None] = []
        self.paused = 0
        self.pipe: LinkPipe | None = None
        self._ring = bytearray(16)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, LinkPipe)
        self.pipe = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self._ring[:nbytes]
        self.times.append(asyncio.get_running_loop().time())

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.append(error)


async def pair(network: Network) -> tuple[Ear, Ear]:
    listening = Ear()
    address = tcp_address(B, 7)
    await network.transport(B).listen(address, lambda: listening)
    dialling = Ear()
    await network.transport(A).dial(address, lambda: dialling)
    return dialling, listening


def pipe(ear: Ear) -> LinkPipe:
    assert ear.pipe is not None
    return ear.pipe


def test_bytes_arrive_in_order_after_the_delay() -> None:
    async def main() -> None:
        one, other = await pair(Network(Trace(), LinkOptions(delay_s=0.25)))
        started = asyncio.get_running_loop().time()
        for number in range(200):
            pipe(one).write(bytes([number]))
        await asyncio.sleep(1)
        assert other.heard == bytes(range(200))
        assert other.times[0] - started == pytest.approx(0.25)

    run(main())


def test_bandwidth_takes_its_time_and_holds_the_writer_back() -> None:
    async def main() -> None:
        one, other = await pair(Network(Trace(), LinkOptions(delay_s=0.1, bytes_per_s=1000)))
        pipe(one).set_write_buffer_limits(100, 10)
        started = asyncio.get_running_loop().time()
        pipe(one).write(bytes(500))
        pipe(one).write(bytes(500))
        assert one.paused == 1
        await asyncio.sleep(2)
        assert one.paused == 0
        assert other.times[-1] - started == pytest.approx(1.1)

    run(main())


def test_a_cut_at_a_byte_delivers_exactly_the_bytes_before_it() -> None:
    async def main() -> None:
        network = Network(Trace())
        network.set_link(A, B, LinkOptions(cut_after_bytes=10))
        one, other = await pair(network)
        pipe(one).write(b"12345678")
        pipe(one).write(b"abcdefgh")
        await asyncio.sleep(1)
        assert other.heard == b"12345678ab"
        assert [type(error) for error in one.ended + other.ended] == [ConnectionResetError] * 2

    run(main())


def test_closing_delivers_what_was_written_and_aborting_does_not() -> None:
    async def main() -> None:
        network = Network(Trace())
        one, other = await pair(network)
        pipe(one).write(b"last words")
        pipe(one).close()
        await asyncio.sleep(1)
        assert other.heard == b"last words"
        assert one.ended == other.ended == [None]
        one, other = await pair(network)
        pipe(one).write(b"never")
        pipe(one).abort()
        await asyncio.sleep(1)
        assert other.heard == b""
        assert isinstance(other.ended[0], ConnectionResetError)

    run(main())


def test_a_killed_host_is_gone_for_those_connected_and_for_those_who_dial() -> None:
    async def main() -> None:
        network = Network(Trace())
        one, other = await pair(network)
        network.kill(B)
        await asyncio.sleep(1)
        assert one.ended
        assert other.ended
        with pytest.raises(DialError):
            await network.transport(A).dial(tcp_address(B, 7), Ear)

    run(main())
