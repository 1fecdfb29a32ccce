"""One end of a simulated connection against asyncio's own over loopback sockets: the same script, the same events."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from netsim.fabric import Card, Fabric, Path
from netsim.loop import run
from netsim.trace import Trace
from overlay.multiaddr import tcp_address

BULK = 3_000_000


class Ear(asyncio.BufferedProtocol):
    """Notes what it is told, bytes as one event however they came."""

    def __init__(self, buffer_bytes: int = 256 << 10, keeps_open: bool = False) -> None:
        self.told: list[str] = []
        self.heard = 0
        self.largest = 0
        self.ended = asyncio.Event()
        self.changed = asyncio.Event()
        self.transport: asyncio.Transport | None = None
        self._ring = bytearray(buffer_bytes)
        self._keeps_open = keeps_open

    @property
    def pipe(self) -> asyncio.Transport:
        assert self.transport is not None
        return self.transport

    def note(self, what: str) -> None:
        self.told.append(what)
        self.changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.note("made")

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += nbytes
        self.largest = max(self.largest, nbytes)
        if self.told[-1] != "bytes":
            self.note("bytes")
        self.changed.set()

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def eof_received(self) -> bool:
        self.note("eof")
        return self._keeps_open

    def connection_lost(self, error: Exception | None) -> None:
        self.note(f"lost {type(error).__name__ if error else 'cleanly'}")
        self.ended.set()

    async def wait_heard(self, count: int) -> None:
        while self.heard < count:
            self.changed.clear()
            await self.changed.wait()

    async def wait_told(self, what: str) -> None:
        while what not in self.told:
            self.changed.clear()
            await self.changed.wait()


Script = Callable[[Ear, Ear], Awaitable[None]]


def over_sockets(script: Script, make: Callable[[], Ear]) -> tuple[list[str], list[str]]:
    async def main() -> tuple[list[str], list[str]]:
        loop = asyncio.get_running_loop()
        accepted = make()
        server = await loop.create_server(lambda: accepted, "127.0.0.1", 0)
        _, dialled = await loop.create_connection(make, *server.sockets[0].getsockname())
        await accepted.wait_told("made")
        server.close()
        for ear in (dialled, accepted):
            ear.pipe.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(20):
            await script(dialled, accepted)
        return dialled.told, accepted.told

    return asyncio.run(main())


def over_the_fabric(script: Script, make: Callable[[], Ear]) -> tuple[list[str], list[str]]:
    async def main() -> tuple[list[str], list[str]]:
        fabric = Fabric(Trace(asyncio.get_running_loop().time), random.Random(1), Path(delay_s=0.01))
        for name, address in (("a", "20.0.0.1"), ("b", "20.0.0.2")):
            fabric.add_host(name, address, Card())
        accepted = make()
        await fabric.transport("b").listen(tcp_address("20.0.0.2", 4001), lambda: accepted)
        dialled = cast(Ear, await fabric.transport("a").dial(tcp_address("20.0.0.2", 4001), make))
        await accepted.wait_told("made")
        async with asyncio.timeout(2000):
            await script(dialled, accepted)
        return dialled.told, accepted.told

    return run(main())


async def closes_after_writing(one: Ear, other: Ear) -> None:
    one.pipe.write(bytes(20 * BULK))
    one.pipe.close()
    assert one.pipe.is_closing()
    assert "lost cleanly" not in one.told, "never from within close()"
    one.pipe.close()
    await other.ended.wait()
    await one.ended.wait()
    assert other.heard == 20 * BULK


async def closes_with_nothing_to_write(one: Ear, other: Ear) -> None:
    one.pipe.close()
    one.pipe.write(b"ignored")
    await other.ended.wait()
    assert other.heard == 0


async def aborts(one: Ear, other: Ear) -> None:
    one.pipe.write(b"small")
    await other.wait_heard(5)
    one.pipe.abort()
    one.pipe.write(b"ignored")
    await other.ended.wait()
    await one.ended.wait()
    assert other.heard == 5


async def aborts_with_a_full_buffer(one: Ear, other: Ear) -> None:
    other.pipe.pause_reading()
    one.pipe.write(bytes(20 * BULK))
    assert one.pipe.get_write_buffer_size() > 0
    one.pipe.abort()
    other.pipe.resume_reading()
    await other.ended.wait()
    assert other.heard < 20 * BULK


async def closes_with_unread_bytes(one: Ear, other: Ear) -> None:
    one.pipe.pause_reading()
    other.pipe.write(b"unread")
    await asyncio.sleep(0.1)
    one.pipe.close()
    await other.ended.wait()
    assert one.heard == 0


async def ends_one_way(one: Ear, other: Ear) -> None:
    """Only a protocol that keeps the connection open can answer."""
    one.pipe.write(b"question")
    one.pipe.write_eof()
    with pytest.raises(RuntimeError):
        one.pipe.write(b"too late")
    await other.wait_told("eof")
    other.pipe.write(b"answer")
    await one.wait_heard(6)
    other.pipe.close()
    await one.wait_told("eof")
    one.pipe.close()
    await one.ended.wait()
    await other.ended.wait()


async def writes_to_a_closed_end(one: Ear, other: Ear) -> None:
    other.pipe.pause_reading()
    one.pipe.close()
    await one.ended.wait()
    await asyncio.sleep(0.1)
    other.pipe.write(b"into the void")
    await asyncio.sleep(0.1)
    assert not other.ended.is_set(), "nobody reads, so nobody hears of the reset"
    other.pipe.write(b"and now it breaks")
    await other.ended.wait()


async def holds_a_fast_writer_back(one: Ear, other: Ear) -> None:
    other.pipe.pause_reading()
    one.pipe.set_write_buffer_limits(1000, 100)
    assert one.pipe.get_write_buffer_limits() == (100, 1000)
    one.pipe.write(bytes(20 * BULK))
    one.pipe.write(bytes(10))
    assert one.told[-1] == "pause"
    assert one.pipe.get_write_buffer_size() > 1000
    assert not other.pipe.is_reading()
    other.pipe.resume_reading()
    await other.wait_heard(20 * BULK + 10)
    await one.wait_told("resume")
    assert one.pipe.get_write_buffer_size() == 0
    one.pipe.close()
    await other.ended.wait()


@pytest.mark.parametrize(
    "script",
    [
        closes_after_writing,
        closes_with_nothing_to_write,
        aborts,
        aborts_with_a_full_buffer,
        closes_with_unread_bytes,
        writes_to_a_closed_end,
        holds_a_fast_writer_back,
    ],
)
def test_a_simulated_connection_tells_what_a_sockets_does(script: Script) -> None:
    assert over_the_fabric(script, Ear) == over_sockets(script, Ear)


def test_a_connection_that_is_kept_open_after_an_end_goes_on_the_other_way() -> None:
    def make() -> Ear:
        return Ear(keeps_open=True)

    assert over_the_fabric(ends_one_way, make) == over_sockets(ends_one_way, make)


@pytest.mark.parametrize(("buffer_bytes", "largest"), [(100, 100), (1 << 20, 64 << 10)])
def test_a_reader_gets_at_most_its_buffer_and_a_chunk_at_once(buffer_bytes: int, largest: int) -> None:
    async def script(one: Ear, other: Ear) -> None:
        other.pipe.pause_reading()
        one.pipe.write(bytes(200_000))
        await asyncio.sleep(10)
        other.pipe.resume_reading()
        await other.wait_heard(200_000)
        assert 0.9 * largest < other.largest <= largest

    over_the_fabric(script, lambda: Ear(buffer_bytes))


def test_reading_that_stops_amid_a_chunk_goes_on_where_it_stopped() -> None:
    class Picky(Ear):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            if self.heard == 300:
                self.pipe.pause_reading()

    async def script(one: Ear, other: Ear) -> None:
        one.pipe.write(bytes(1000))
        one.pipe.write(b"more")
        await asyncio.sleep(10)
        assert other.heard == 300
        other.pipe.resume_reading()
        await other.wait_heard(1004)

    over_the_fabric(script, lambda: Picky(100))
