"""What a stream costs between two processes on loopback: round trips by message size, and bulk bytes per second one way.

Beside each round trip stands the floor of the same run: the same bytes over a bare socket pair of asyncio buffered protocols,
with neither encryption nor streams. Half a round trip is a one-way trip. Run as ``python -m benchmarks.overlay_streams``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import cast

from overlay.host import Host
from overlay.identity import Identity
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports
from overlay.stream import Priority, Stream
from overlay.transport.tcp import TcpTransport
from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock
from tests.overlay.network import MemoryStorage

ECHO, SINK = "/bench/echo/1", "/bench/sink/1"
SIZES = {64: 3000, 16 << 10: 3000, 1 << 20: 200}
WARM_UP = 50
BULK_BYTES = 512 << 20
BULK_WRITE_BYTES = 1 << 20
SECONDS_MAX = 240.0


def _host(number: int) -> Host:
    ports = Ports(LoopClock(), SystemWallClock(), SystemRandomness(), (TcpTransport(),), MemoryStorage())
    return Host(Identity(number.to_bytes(32, "big")), ports)


class Echo:
    """Sends every byte back from where it arrives."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.ended = asyncio.Event()

    def data_received(self, data: memoryview) -> None:
        self._stream.write_nowait(bytes(data))

    def eof_received(self) -> None:
        self.ended.set()

    def stream_lost(self, error: Exception) -> None:
        self.ended.set()


class Counter:
    """Completes `whole` when the bytes it expects have come."""

    def __init__(self) -> None:
        self._left = 0
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def expect(self, count: int) -> asyncio.Future[None]:
        self._left, self.whole = count, asyncio.get_running_loop().create_future()
        return self.whole

    def data_received(self, data: memoryview) -> None:
        self._left -= len(data)
        if self._left <= 0 and not self.whole.done():
            self.whole.set_result(None)

    def eof_received(self) -> None:
        """The other side ends when this one does."""

    def stream_lost(self, error: Exception) -> None:
        if not self.whole.done():
            self.whole.set_exception(error)


class BarePipe(asyncio.BufferedProtocol):
    """The floor: bytes over a socket, echoed or counted."""

    def __init__(self, counter: Counter | None) -> None:
        self._counter = counter
        self._buffer = memoryview(bytearray(256 << 10))
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._counter is None:
            self.transport.write(bytes(self._buffer[:nbytes]))
        else:
            self._counter.data_received(self._buffer[:nbytes])


def serve(addresses: multiprocessing.Queue[tuple[list[str], int]]) -> None:
    """The other process: echo and sink over a host, and the bare echo."""

    async def echo(stream: Stream) -> None:
        receiver = Echo(stream)
        stream.set_receiver(receiver)
        await receiver.ended.wait()

    async def sink(stream: Stream) -> None:
        counter = Counter()
        whole = counter.expect(BULK_BYTES)
        stream.set_receiver(counter)
        await whole
        await stream.write(b"!")

    async def main() -> None:
        async with _host(2) as host:
            host.serve(ECHO, echo, priority=Priority.DECODE)
            host.serve(SINK, sink, priority=Priority.BULK)
            await host.listen(Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))
            server = await asyncio.get_running_loop().create_server(lambda: BarePipe(None), "127.0.0.1", 0)
            addresses.put(([str(found) for found in host.addresses], server.sockets[0].getsockname()[1]))
            await asyncio.sleep(SECONDS_MAX)

    asyncio.run(main())


async def _round_trips(send: Callable[[bytes], None], counter: Counter, size: int, count: int) -> list[float]:
    message, times = bytes(size), []
    for turn in range(count + WARM_UP):
        whole = counter.expect(size)
        started = time.perf_counter()
        send(message)
        await whole
        if turn >= WARM_UP:
            times.append(time.perf_counter() - started)
    return times


def _line(name: str, times: list[float]) -> str:
    ordered = sorted(times)
    return (
        f"{name} p50 {statistics.median(ordered) * 1e6:7.0f} us  p99 {ordered[len(ordered) * 99 // 100] * 1e6:7.0f} us"
    )


async def _bulk(stream: Stream) -> float:
    block = bytes(BULK_WRITE_BYTES)
    started = time.perf_counter()
    for _ in range(BULK_BYTES // BULK_WRITE_BYTES):
        await stream.write(block)
    await stream.read_exactly(1)
    return BULK_BYTES / (time.perf_counter() - started)


async def measure(addresses: list[str], bare_port: int) -> None:
    """Print every figure."""
    bare = Counter()
    _, pipe = await asyncio.get_running_loop().create_connection(lambda: BarePipe(bare), "127.0.0.1", bare_port)
    async with _host(1) as host:
        connection = await host.connect(None, [Multiaddr.parse(text) for text in addresses])
        peer = connection.remote_peer
        stream = await host.open_stream(peer, ECHO, priority=Priority.DECODE)
        counter = Counter()
        stream.set_receiver(counter)
        for size, count in SIZES.items():
            print(
                _line(f"round trip {size:8} B  stream", await _round_trips(stream.write_nowait, counter, size, count))
            )
            print(_line(f"round trip {size:8} B  bare  ", await _round_trips(pipe.transport.write, bare, size, count)))
        for _ in range(3):
            rate = await _bulk(await host.open_stream(peer, SINK, priority=Priority.BULK))
            print(f"bulk, one way: {rate / 1e6:.0f} MB/s (uplink measured {connection.uplink_bytes_per_s})")
    pipe.transport.close()


def main() -> None:
    """Start the other process, measure, and end it."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[tuple[list[str], int]] = context.Queue()
    other = context.Process(target=serve, args=(queue,), daemon=True)
    other.start()
    try:
        asyncio.run(measure(*queue.get(timeout=30)))
    finally:
        other.terminate()
        other.join()


if __name__ == "__main__":
    main()
