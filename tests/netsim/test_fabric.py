"""The simulated internet: dials, deaths, partitions, boxes, and what each end hears of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from netsim.connection import FabricConnection
from netsim.fabric import Card, Fabric, Path
from netsim.loop import run
from netsim.trace import Trace
from overlay.errors import DialError
from overlay.multiaddr import tcp_address

ADDRESSES = {"a": "20.0.0.1", "b": "20.1.0.1", "c": "20.2.0.1"}


class Ear(asyncio.BufferedProtocol):
    """Keeps what it hears, and when."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.times: list[float] = []
        self.ended: list[Exception | None] = []
        self.eofs = 0
        self.paused = 0
        self.made = 0
        self.transport: FabricConnection | None = None
        self._ring = bytearray(256 << 10)

    @property
    def pipe(self) -> FabricConnection:
        assert self.transport is not None
        return self.transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, FabricConnection)
        self.transport = transport
        self.made += 1

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self._ring[:nbytes]
        self.times.append(asyncio.get_running_loop().time())

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def eof_received(self) -> bool:
        self.eofs += 1
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.append(error)


class World:
    """Three hosts."""

    def __init__(self, path: Path | None = None, card: Card | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.trace = Trace(self.loop.time)
        self.fabric = Fabric(self.trace, random.Random(7), path or Path(delay_s=0.05))
        for name, address in ADDRESSES.items():
            self.fabric.add_host(name, address, card or Card())

    async def pair(self, one: str = "a", other: str = "b", port: int = 4001) -> tuple[Ear, Ear]:
        accepted: list[Ear] = []

        def accept() -> Ear:
            accepted.append(Ear())
            return accepted[-1]

        listener = await self.fabric.transport(other).listen(tcp_address(ADDRESSES[other], port), accept)
        dialled = await self.fabric.transport(one).dial(tcp_address(ADDRESSES[other], port), Ear)
        await asyncio.sleep(0.2)
        listener.close()
        assert isinstance(dialled, Ear)
        assert len(accepted) == 1
        return dialled, accepted[0]


def simulate(main: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(100_000):
            await main()

    run(guarded())


def test_a_dial_costs_a_round_trip_and_bytes_the_way() -> None:
    async def main() -> None:
        world = World()
        began = world.loop.time()
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        one = await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        assert world.loop.time() - began == pytest.approx(0.1)
        assert accepted.made == 0
        one.pipe.write(b"hello")
        await asyncio.sleep(1)
        assert (one.made, accepted.made, bytes(accepted.heard)) == (1, 1, b"hello")
        assert accepted.times[0] - began == pytest.approx(0.15)
        assert one.pipe.get_extra_info("peername") == (ADDRESSES["b"], 4001)
        assert accepted.pipe.get_extra_info("peername") == one.pipe.get_extra_info("sockname")

    simulate(main)


def test_bytes_arrive_in_order() -> None:
    async def main() -> None:
        world = World(Path(delay_s=0.05, jitter_s=0.03, loss=0.02))
        one, other = await world.pair()
        sent = bytes(number % 251 for number in range(1_000_000))
        for start in range(0, len(sent), 777):
            one.pipe.write(sent[start : start + 777])
        await asyncio.sleep(200)
        assert bytes(other.heard) == sent

    simulate(main)


def test_nobody_listening_refuses_after_a_round_trip_and_nobody_there_says_nothing() -> None:
    async def main() -> None:
        world = World()
        began = world.loop.time()
        with pytest.raises(DialError, match="refused"):
            await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 1), Ear)
        assert world.loop.time() - began == pytest.approx(0.1)
        began = world.loop.time()
        with pytest.raises(DialError, match="timed out"):
            await world.fabric.transport("a").dial(tcp_address("99.9.9.9", 1), Ear)
        assert world.loop.time() - began == pytest.approx(127)
        world.fabric.power_off("b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)

    simulate(main)


def test_closing_delivers_what_was_written_and_both_ends_hear_it_once() -> None:
    async def main() -> None:
        one, other = await World().pair()
        one.pipe.write(b"last words")
        one.pipe.close()
        one.pipe.close()
        assert one.pipe.is_closing()
        await asyncio.sleep(1)
        assert other.heard == b"last words"
        assert (one.ended, other.ended, other.eofs) == ([None], [None], 1)

    simulate(main)
