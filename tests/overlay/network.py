"""Real hosts on loopback for the overlay's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from overlay.host import Host, HostConfig
from overlay.identity import Identity
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports
from overlay.stream import Stream
from overlay.transport.tcp import TcpTransport
from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


class MemoryStorage:
    """`Storage` in a dict."""

    def __init__(self) -> None:
        self.saved: dict[str, bytes] = {}

    def load(self, name: str) -> bytes | None:
        return self.saved.get(name)

    def save(self, name: str, data: bytes) -> None:
        self.saved[name] = data


def system_ports() -> Ports:
    return Ports(LoopClock(), SystemWallClock(), SystemRandomness(), (TcpTransport(),), MemoryStorage())


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def run_hosts(
    count: int,
    scene: Callable[..., Awaitable[None]],
    *,
    configs: dict[int, HostConfig] | None = None,
    timeout_s: float = 30,
) -> None:
    """Run ``scene(host, host, ...)`` with listening hosts; fails when tasks are left over."""

    async def main() -> None:
        async with asyncio.timeout(timeout_s), AsyncExitStack() as stack:
            hosts = []
            for number in range(1, count + 1):
                host = Host(identity(number), system_ports(), (configs or {}).get(number))
                hosts.append(await stack.enter_async_context(host))
                await host.listen(LOOPBACK)
            await scene(*hosts)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    asyncio.run(main())


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that sockets bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def echo(stream: Stream) -> None:
    """A handler: all that comes goes back."""
    while data := await stream.read():
        await stream.write(data)
    await stream.close_write()


async def mute(stream: Stream) -> None:
    """A handler that never says anything."""
    await asyncio.Event().wait()
