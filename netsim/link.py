"""In-memory links that speak asyncio's Transport/BufferedProtocol pair: unchanged hosts connect over them.

Owns delay, bandwidth and cuts (at a byte, at a moment, of a whole host), and a trace of what happened when: bytes are counted,
never looked at, since they are encrypted with fresh keys. Knows nothing of what runs above. For `netsim.loop`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from overlay.errors import DialError
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.ports import ProtocolFactory

HIGH_WATER_BYTES = 64 << 10
FIRST_EPHEMERAL_PORT = 49152


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """One direction between two hosts.

    ``cut_after_bytes`` ends every connection with a reset once that many bytes have arrived on it in this direction;
    ``is_black_hole`` swallows what is sent, silently.
    """

    delay_s: float = 0.005
    bytes_per_s: float | None = None
    cut_after_bytes: int | None = None
    is_black_hole: bool = False


class Trace:
    """What happened, in order: two runs of one seed must tell the same story."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, now: float, text: str) -> None:
        self.lines.append(f"{now:.9f} {text}")

    def digest(self) -> str:
        return sha256("\n".join(self.lines).encode()).hexdigest()


class Network:
    """Hosts by IP address, and the links between them."""

    def __init__(self, trace: Trace, default: LinkOptions | None = None) -> None:
        self.trace = trace
        self._default = default or LinkOptions()
        self._options: dict[tuple[str, str], LinkOptions] = {}
        self._listeners: dict[tuple[str, int], LinkListener] = {}
        self._pipes: list[LinkPipe] = []
        self._dead: list[str] = []
        self._next_port = FIRST_EPHEMERAL_PORT

    def transport(self, host: str) -> LinkTransport:
        """The `overlay.ports.Transport` of one host."""
        return LinkTransport(self, host)

    def set_link(self, source: str, target: str, options: LinkOptions) -> None:
        """From now on, also for live connections."""
        self._options[source, target] = options

    def options(self, source: str, target: str) -> LinkOptions:
        return self._options.get((source, target), self._default)

    def cut(self, one: str, other: str) -> None:
        """Reset every connection between two hosts, now."""
        for pipe in list(self._pipes):
            if {pipe.host, pipe.remote_host} == {one, other}:
                pipe.reset()

    def kill(self, host: str) -> None:
        """A host vanishes: its connections are reset, nothing listens there any more."""
        self._dead.append(host)
        for key in [key for key in self._listeners if key[0] == host]:
            del self._listeners[key]
        for pipe in list(self._pipes):
            if host in (pipe.host, pipe.remote_host):
                pipe.reset()

    def free_port(self) -> int:
        self._next_port += 1
        return self._next_port

    def listen(self, listener: LinkListener) -> None:
        self._listeners[listener.host, listener.port] = listener

    def unlisten(self, listener: LinkListener) -> None:
        if self._listeners.get((listener.host, listener.port)) is listener:
            del self._listeners[listener.host, listener.port]

    def connect(self, source: str, target: str, port: int, factory: ProtocolFactory) -> asyncio.BufferedProtocol:
        """Join two protocols; raises DialError when nobody listens there."""
        listener = self._listeners.get((target, port))
        if listener is None or source in self._dead or target in self._dead:
            raise DialError(f"Nothing listens on {target}:{port}.")
        here = LinkPipe(self, (source, self.free_port()), (target, port))
        there = LinkPipe(self, (target, port), here.address)
        here.join(there)
        there.join(here)
        self._pipes += (here, there)
        dialler, acceptor = factory(), listener.factory()
        here.set_protocol(dialler)
        there.set_protocol(acceptor)
        self.trace.add(asyncio.get_running_loop().time(), f"connect {source} {target}")
        acceptor.connection_made(there)
        dialler.connection_made(here)
        return dialler

    def forget(self, pipe: LinkPipe) -> None:
        if pipe in self._pipes:
            self._pipes.remove(pipe)


class LinkListener:
    """A place where connections arrive."""

    def __init__(self, network: Network, host: str, port: int, factory: ProtocolFactory) -> None:
        self._network = network
        self.host = host
        self.port = port
        self.factory = factory

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        return (tcp_address(self.host, self.port),)

    def close(self) -> None:
        self._network.unlisten(self)


class LinkTransport:
    """`overlay.ports.Transport` of one simulated host."""

    def __init__(self, network: Network, host: str) -> None:
        self._network = network
        self._host = host

    def can_dial(self, address: Multiaddr) -> bool:
        return address.is_tcp

    async def dial(self, address: Multiaddr, factory: ProtocolFactory) -> asyncio.BufferedProtocol:
        """One round trip, as a TCP handshake takes. Raises DialError."""
        host, port = address.host, address.port
        if host is None or port is None:
            raise DialError(f"{address} is no TCP address.")
        there, back = self._network.options(self._host, host), self._network.options(host, self._host)
        await asyncio.sleep(there.delay_s + back.delay_s)
        return self._network.connect(self._host, host, port, factory)

    async def listen(self, address: Multiaddr, factory: ProtocolFactory) -> LinkListener:
        """Port 0 takes a free one; the host part must be this host's, or a wildcard."""
        listener = LinkListener(self._network, self._host, address.port or self._network.free_port(), factory)
        self._network.listen(listener)
        return listener


class LinkPipe(asyncio.Transport):
    """One end of a connection. What is written arrives at the other end in order, after the link's time."""

    def __init__(self, network: Network, address: tuple[str, int], remote: tuple[str, int]) -> None:
        super().__init__({"sockname": address, "peername": remote})
        self._network = network
        self.address = address
        self.host, self.remote_host = address[0], remote[0]
        self._loop = asyncio.get_running_loop()
        self._other: LinkPipe | None = None
        self._protocol: asyncio.BufferedProtocol | None = None
        self._inbox: deque[bytes] = deque()
        self._arrived_bytes = 0
        self._leaving: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._free_at = 0.0
        self._high, self._low = HIGH_WATER_BYTES, HIGH_WATER_BYTES // 4
        self._writing_paused = False
        self._reading_paused = False
        self._closing = False
        self._lost = False

    def join(self, other: LinkPipe) -> None:
        self._other = other

    # --- asyncio.Transport ---

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.BufferedProtocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        payload = bytes(data)
        if self._closing or not payload:
            return
        options = self._network.options(self.host, self.remote_host)
        now = self._loop.time()
        took_s = len(payload) / options.bytes_per_s if options.bytes_per_s else 0.0
        self._free_at = max(now, self._free_at) + took_s
        if took_s:
            self._unsent_bytes += len(payload)
            self._loop.call_at(self._free_at, self._left, len(payload))
            if self._unsent_bytes > self._high and not self._writing_paused and self._protocol is not None:
                self._writing_paused = True
                self._protocol.pause_writing()
        if options.is_black_hole:
            return
        # Timers of one moment run in no promised order; the queue keeps the bytes in theirs.
        self._leaving.append(payload)
        self._loop.call_at(self._free_at + options.delay_s, self._arrive)

    def write_eof(self) -> None:
        raise NotImplementedError("links end both ways at once")

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._loop.call_soon(self._deliver)

    def is_reading(self) -> bool:
        return not self._reading_paused

    def close(self) -> None:
        """What was written still arrives, then the other end sees the end."""
        if self._closing:
            return
        self._closing = True
        options = self._network.options(self.host, self.remote_host)
        due = max(self._loop.time(), self._free_at) + options.delay_s
        if self._other is not None and not options.is_black_hole:
            self._leaving.append(b"")
            self._loop.call_at(due, self._arrive)
        self._loop.call_soon(self.lose, None)

    def abort(self) -> None:
        """Now, both ways: the other end sees a reset when the news has travelled."""
        if self._lost:
            return
        self._leaving.clear()
        self._closing = True
        options = self._network.options(self.host, self.remote_host)
        if self._other is not None and not options.is_black_hole:
            error = ConnectionResetError("the other end gave up")
            self._loop.call_later(options.delay_s, self._other.lose, error)
        self._loop.call_soon(self.lose, None)

    # --- the link ---

    def reset(self) -> None:
        """The network ends the connection, at this end."""
        self._leaving.clear()
        self._loop.call_soon(self.lose, ConnectionResetError("the link was cut"))

    def lose(self, error: Exception | None) -> None:
        """This end is over; said once."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._inbox.clear()
        self._network.forget(self)
        self._network.trace.add(self._loop.time(), f"end {self.host} {self.remote_host} {type(error).__name__}")
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def _left(self, count: int) -> None:
        self._unsent_bytes -= count
        if self._writing_paused and self._unsent_bytes <= self._low and not self._lost:
            self._writing_paused = False
            if self._protocol is not None:
                self._protocol.resume_writing()

    def _arrive(self) -> None:
        """The oldest bytes on the wire reach the other end."""
        other = self._other
        if not self._leaving or other is None:
            return
        payload = self._leaving.popleft()
        if other._lost:
            return
        options = self._network.options(self.host, self.remote_host)
        cut_at = options.cut_after_bytes
        is_cut = cut_at is not None and other._arrived_bytes + len(payload) > cut_at
        if cut_at is not None and is_cut:
            payload = payload[: max(0, cut_at - other._arrived_bytes)]
        self._network.trace.add(self._loop.time(), f"{self.host} {self.remote_host} {len(payload)}")
        other._arrived_bytes += len(payload)
        if payload or not is_cut:
            other._inbox.append(payload)
        other._deliver()
        if is_cut:
            self.reset()
            other.reset()

    def _deliver(self) -> None:
        protocol = self._protocol
        while self._inbox and not self._reading_paused and not self._lost and protocol is not None:
            payload = self._inbox.popleft()
            if not payload:
                if not protocol.eof_received():
                    self.close()
                return
            while payload and not self._lost:
                buffer = memoryview(cast(Any, protocol.get_buffer(-1)))
                count = min(len(buffer), len(payload))
                buffer[:count] = payload[:count]
                payload = payload[count:]
                protocol.buffer_updated(count)
