"""An overlay host and nothing above it: for what streams do, and who can dial whom.

Owns five small protocols. *Takers* swallow windows (length u32, moment of sending f64, bytes) as they come and say how long each was
under way; `DECODE` and `BULK` differ in priority alone. `DRIP` reads so many bytes a second and no more. `ECHO` gives back what it
reads. `CROSS` writes before it reads, as the other side does. `CALL` is a unary call. Virtual time is everybody's, so a window's
trip is the difference of two readings of it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from netsim.null_channel import null_channel
from netsim.sim_host import SimHost
from overlay.errors import PeerdError, ProtocolViolation
from overlay.host import Host, secure_with_noise
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.types import Message
from overlay.rpc.unary import call, serve_unary
from overlay.stream import Priority, Stream

DECODE, BULK, DRIP, ECHO, CROSS, CALL = (
    f"/netsim/{name}/1" for name in ("decode", "bulk", "drip", "echo", "cross", "call")
)
PRIORITIES = {
    DECODE: Priority.DECODE,
    BULK: Priority.BULK,
    DRIP: Priority.BULK,
    ECHO: Priority.CONTROL,
    CROSS: Priority.BULK,
}
WINDOW_HEADER = struct.Struct(">Id")
WINDOW_BYTES_MAX = 64 << 20
STREAMS_PER_PEER = 1024
PIECE_BYTES = 64 << 10
SEED_BYTES = 32

OnWindow = Callable[[str, int, float], None]
"""Told the protocol, the bytes and the seconds of a window that has come whole."""


@dataclass(frozen=True, slots=True)
class BareSettings:
    """What it is told.

    Attributes:
        drip_bytes_per_s: how fast `DRIP` reads.
        cross_bytes: what `CROSS` writes before it reads as much, after waiting for ``cross_patience_s``.
        listens: whether anybody can dial it.
    """

    drip_bytes_per_s: float = 64 << 10
    cross_bytes: int = 4 << 20
    cross_patience_s: float = 0.0
    listens: bool = True


class BarePeer:
    """`netsim.peers.Peer`; ``overlay`` is the host. Workloads set ``on_window``."""

    SETTINGS: ClassVar[type[BareSettings]] = BareSettings

    def __init__(self, host: SimHost, settings: BareSettings) -> None:
        self._host = host
        self._settings = settings
        self._stopping = asyncio.Event()
        self.is_ready = asyncio.Event()
        self.on_window: OnWindow = lambda protocol, length, seconds: None
        self.received_bytes = 0
        """What `DRIP` and `ECHO` have read so far."""
        identity = Identity.load_or_create(host.storage, host.ports.randomness)
        self.overlay = Host(identity, host.ports, secure=secure_with_noise if host.world.is_noise else null_channel)

    @property
    def peer_id(self) -> PeerId:
        return self.overlay.peer_id

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where others may find it."""
        return (self._host.listen_address,)

    async def run(self) -> None:
        async with self.overlay as overlay:
            for protocol in (DECODE, BULK):
                self._serve(protocol, self._take)
            self._serve(DRIP, self._drip)
            self._serve(ECHO, self._echo)
            self._serve(CROSS, self.cross)
            serve_unary(overlay, CALL, {"echo": _answer})
            if self._settings.listens:
                await overlay.listen(self._host.listen_address)
            self.is_ready.set()
            await self._stopping.wait()

    def request_stop(self) -> None:
        self._stopping.set()

    def _serve(self, protocol: str, handler: Callable[[Stream], Awaitable[object]]) -> None:
        async def handle(stream: Stream) -> None:
            await handler(stream)

        self.overlay.serve(
            protocol,
            handle,
            max_inbound_per_peer=STREAMS_PER_PEER,
            priority=PRIORITIES[protocol],
        )

    # --- what is served ---

    async def _take(self, stream: Stream) -> None:
        taker = Taker(stream.protocol, self._host.ports.clock.now, self._tell)
        stream.set_receiver(taker)
        await taker.ended.wait()

    def _tell(self, protocol: str, length: int, seconds: float) -> None:
        self.on_window(protocol, length, seconds)

    async def _drip(self, stream: Stream) -> None:
        while piece := await stream.read(PIECE_BYTES):
            self.received_bytes += len(piece)
            await asyncio.sleep(len(piece) / self._settings.drip_bytes_per_s)

    async def _echo(self, stream: Stream) -> None:
        while piece := await stream.read(PIECE_BYTES):
            self.received_bytes += len(piece)
            await stream.write(piece)

    async def cross(self, stream: Stream) -> int:
        """Write everything, and only then read what the other side wrote before it read; the bytes that were as they should be."""
        count = self._settings.cross_bytes
        stream.write_nowait(_pattern(count))
        await asyncio.sleep(self._settings.cross_patience_s)
        data = await stream.read_exactly(count)
        await stream.close_write()
        return count if data == _pattern(count) else 0

    # --- what a workload may ask; run it in the host's context ---

    async def connect(self, other: BarePeer) -> None:
        """Dial it, unless it is connected. Raises DialError, UpgradeError."""
        await self.overlay.connect(other.peer_id, other.addresses)

    async def open(self, other: BarePeer, protocol: str) -> Stream:
        """A stream to it. Raises typed errors."""
        return await self.overlay.open_stream(
            other.peer_id, protocol, addresses=other.addresses, priority=PRIORITIES.get(protocol, Priority.CONTROL)
        )

    async def call(self, other: BarePeer, size_bytes: int, timeout_s: float = 10.0) -> bool:
        """Whether it answered with what it was asked. Raises typed errors."""
        text = "x" * size_bytes
        answer = await call(
            self.overlay, other.peer_id, CALL, Message("echo", {"text": text}),
            timeout_s=timeout_s, addresses=other.addresses,
        )  # fmt: skip
        return answer.header.get("text") == text


def _pattern(count: int) -> bytes:
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def window(length: int, now: float) -> bytes:
    """What a taker takes."""
    return WINDOW_HEADER.pack(length, now) + bytes(length)


class Taker:
    """Counts windows of one stream as their bytes come; holds no more than a header."""

    def __init__(self, protocol: str, now: Callable[[], float], on_window: OnWindow) -> None:
        self._protocol = protocol
        self._now = now
        self._on_window = on_window
        self._header = bytearray()
        self._left = 0
        self.ended = asyncio.Event()

    def data_received(self, data: memoryview) -> None:
        """Raises ProtocolViolation."""
        offset = 0
        while offset < len(data):
            if len(self._header) < WINDOW_HEADER.size:
                take = min(WINDOW_HEADER.size - len(self._header), len(data) - offset)
                self._header += data[offset : offset + take]
                offset += take
                if len(self._header) < WINDOW_HEADER.size:
                    return
                self._left, _ = WINDOW_HEADER.unpack(self._header)
                if not 0 < self._left <= WINDOW_BYTES_MAX:
                    raise ProtocolViolation("A peer sent a window of an impossible length.")
            take = min(self._left, len(data) - offset)
            offset += take
            self._left -= take
            if not self._left:
                length, sent_at = WINDOW_HEADER.unpack(self._header)
                self._header.clear()
                self._on_window(self._protocol, length, self._now() - sent_at)

    def eof_received(self) -> None:
        self.ended.set()

    def stream_lost(self, error: PeerdError) -> None:
        self.ended.set()


async def _answer(peer: PeerId, question: Message) -> Message:
    return replace(question, kind="answer", recipient=b"", header_bytes=None, signature=None)


PEER = BarePeer
