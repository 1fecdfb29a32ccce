"""Plain TCP and one line each way: who I am, and as whom I see you. For what NAT boxes let through, with nothing of ours on top.

Dials may leave from the listening port, as hole punching needs it and production does not do yet.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.listening_peer import ListeningPeer
from netsim.nat import Endpoint
from netsim.sim_host import LISTEN_PORT, SimHost
from overlay.errors import DialError
from overlay.multiaddr import Multiaddr, tcp_address

LINE_BYTES_MAX = 200


@dataclass(frozen=True, slots=True)
class RawSettings:
    """It is told nothing."""


class RawPeer(ListeningPeer):
    """`netsim.peers.Peer`."""

    SETTINGS: ClassVar[type[RawSettings]] = RawSettings

    def __init__(self, host: SimHost, settings: RawSettings) -> None:
        super().__init__(host)
        self.seen_as: dict[str, Endpoint] = {}
        """By others' names: the endpoint by which they saw this host on the last connection with them."""
        self._lines: list[_Line] = []

    def greet(self) -> _Line:
        return _Line(self)

    # --- what a workload may ask; run it in the host's context ---

    async def reach(self, name: str, address: Multiaddr, *, patience_s: float, from_listener: bool = False) -> bool:
        """Whether a connection with ``name`` came about: by dialling it, or by its dialling meanwhile."""
        self.seen_as.pop(name, None)
        try:
            async with asyncio.timeout(patience_s):
                line = await self.host.transport.dial(
                    address, lambda: _Line(self), LISTEN_PORT if from_listener else None
                )
                await cast(_Line, line).told.wait()
        except (DialError, TimeoutError):
            pass
        return name in self.seen_as

    def close_all(self, keep: str) -> None:
        """End every connection but that with ``keep``."""
        for line in list(self._lines):
            if line.name != keep:
                line.close()

    def opened(self, line: _Line) -> None:
        self._lines.append(line)

    def closed(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)


class _Line(asyncio.BufferedProtocol):
    """One connection: says its line, hears the other's."""

    def __init__(self, peer: RawPeer) -> None:
        self._peer = peer
        self._space = memoryview(bytearray(LINE_BYTES_MAX))
        self._got = b""
        self._transport: asyncio.Transport | None = None
        self.name = ""
        self.told = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        address, port = transport.get_extra_info("peername")
        self._transport.write(f"{self._peer.host.name} {address} {port}\n".encode())
        self._peer.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        self._got += self._space[:nbytes]
        if self.name or not self._got.endswith(b"\n"):
            return
        self.name, address, port = self._got.decode().split()
        self._peer.seen_as[self.name] = (address, int(port))
        self.told.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._peer.closed(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def address_of(endpoint: Endpoint) -> Multiaddr:
    """The endpoint as a multiaddr."""
    return tcp_address(*endpoint)


PEER = RawPeer
