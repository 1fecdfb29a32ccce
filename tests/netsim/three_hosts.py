"""Three hosts on a fabric, and an end of a connection that keeps what it hears. For the tests of the fabric's parts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from netsim.connection import FabricConnection
from netsim.fabric import Card, Fabric, Path
from netsim.loop import run
from netsim.trace import Trace
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
        self.addresses = dict(ADDRESSES)
        self.loop = asyncio.get_running_loop()
        self.trace = Trace(self.loop.time)
        self.fabric = Fabric(self.trace, random.Random(7), path or Path(delay_s=0.05))
        for name, address in self.addresses.items():
            self.fabric.add_host(name, address, card or Card())

    async def pair(self, one: str = "a", other: str = "b", port: int = 4001) -> tuple[Ear, Ear]:
        accepted: list[Ear] = []

        def accept() -> Ear:
            accepted.append(Ear())
            return accepted[-1]

        listener = await self.fabric.transport(other).listen(tcp_address(self.addresses[other], port), accept)
        dialled = await self.fabric.transport(one).dial(tcp_address(self.addresses[other], port), Ear)
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
