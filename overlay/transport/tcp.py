"""TCP as `overlay.ports.Transport`: NODELAY, a small unsent backlog so that priorities reach the wire, keep-alive."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from dataclasses import dataclass

import psutil

from overlay import limits
from overlay.errors import DialError, PeerdError
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.ports import ProtocolFactory

TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
BACKLOG = 128


class ListenError(PeerdError):
    """The listening address can't be used."""

    code = "listen-failed"
    exit_code = 10


@dataclass(frozen=True, slots=True)
class TcpListener:
    """A listening socket and the addresses that others can use for it."""

    server: asyncio.Server
    addresses: tuple[Multiaddr, ...]

    def close(self) -> None:
        self.server.close()


class TcpTransport:
    """See the module."""

    def can_dial(self, address: Multiaddr) -> bool:
        return address.is_tcp

    async def dial(self, address: Multiaddr, factory: ProtocolFactory) -> asyncio.BufferedProtocol:
        """Connect; raises DialError. Cancel-safe."""
        host, port = address.host, address.port
        if host is None or port is None:
            raise DialError(f"{address} is no TCP address.")
        family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(address.parts[0][0], socket.AF_UNSPEC)
        try:
            transport, protocol = await asyncio.get_running_loop().create_connection(factory, host, port, family=family)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise DialError(f"Can't reach {address} ({reason}); is the peer running?") from error
        _tune(transport.get_extra_info("socket"))
        return protocol

    async def listen(self, address: Multiaddr, factory: ProtocolFactory) -> TcpListener:
        """Listen; raises ListenError. Port 0 lets the kernel choose."""
        host, port = address.host, address.port
        if host is None or port is None or not address.is_tcp:
            raise ListenError(f"Can't listen on {address}; use an address like /ip4/0.0.0.0/tcp/4001.")

        try:
            server = await asyncio.get_running_loop().create_server(factory, host, port, backlog=BACKLOG)
        except OSError as error:
            advice = (
                "another program uses it; give another port with --listen"
                if error.errno == errno.EADDRINUSE
                else "check --listen"
            )
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ListenError(f"Can't listen on {address} ({reason}): {advice}.") from error
        names = [sock.getsockname() for sock in server.sockets]
        for sock in server.sockets:
            _tune(sock)
        return TcpListener(server, tuple(found for name in names for found in _reachable(name[0], name[1])))


def _tune(sock: socket.socket) -> None:
    """Accepted sockets inherit what the listening one was given."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, limits.NOTSENT_LOWAT_BYTES),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def _reachable(host: str, port: int) -> list[Multiaddr]:
    """The addresses behind a socket's name: a wildcard stands for every interface, loopback last."""
    if host not in ("0.0.0.0", "::"):
        return [tcp_address(host, port)]
    wanted = (socket.AF_INET,) if host == "0.0.0.0" else (socket.AF_INET6,)
    found: list[Multiaddr] = []
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family in wanted and "%" not in entry.address and not entry.address.startswith("fe80"):
                with contextlib.suppress(ValueError):
                    found.append(tcp_address(entry.address, port))
    return sorted(found, key=lambda address: (address.is_loopback, str(address)))
