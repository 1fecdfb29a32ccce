"""What peers have in common that do nothing but listen until they are asked to stop; the rest is asked of them by workloads."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from netsim.sim_host import SimHost


class ListeningPeer(ABC):
    """Most of a `netsim.peers.Peer`. Those who inherit from it say who greets whoever dials."""

    def __init__(self, host: SimHost) -> None:
        self.host = host
        self.is_ready = asyncio.Event()
        self._stopping = asyncio.Event()

    @abstractmethod
    def greet(self) -> asyncio.BufferedProtocol:
        """The near end of a connection that somebody makes."""

    async def run(self) -> None:
        """Until asked to stop; connections are left to those who made them."""
        listener = await self.host.transport.listen(self.host.listen_address, self.greet)
        try:
            self.is_ready.set()
            await self._stopping.wait()
        finally:
            listener.close()

    def request_stop(self) -> None:
        self._stopping.set()
