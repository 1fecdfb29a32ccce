"""A peer with nothing of ours in it: sends what it gets back, and asks others over plain connections. For tests of the simulator itself.

A question is a length (4 bytes) and so many bytes; the answer is the same bytes. Its lies are `silent` (no answer) and `wrong`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.sim_host import SimHost
from overlay.multiaddr import Multiaddr

LENGTH_BYTES = 4
ECHO_BYTES_MAX = 1 << 20
READ_BYTES = 16 << 10
STARTS_FILE = "starts"


@dataclass(frozen=True, slots=True)
class EchoSettings:
    """What it is told."""

    stop_s: float = 0.1
    """How long it takes to stop in good order."""


class EchoPeer:
    """See the module."""

    SETTINGS: ClassVar[type[EchoSettings]] = EchoSettings

    def __init__(self, host: SimHost, settings: EchoSettings) -> None:
        self.host = host
        self.starts = 0
        """How often this machine started, as its disk knows."""
        self._settings = settings
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        saved = self.host.storage.load(STARTS_FILE)
        self.starts = 1 + int(saved or b"0")
        self.host.storage.save(STARTS_FILE, b"%d" % self.starts)
        listener = await self.host.transport.listen(self.host.listen_address, lambda: _Echoing(self.host))
        try:
            await self._stopping.wait()
            await asyncio.sleep(self._settings.stop_s)
        finally:
            listener.close()

    def request_stop(self) -> None:
        self._stopping.set()

    async def ask(self, address: Multiaddr, data: bytes, timeout_s: float) -> bytes:
        """What comes back. Raises DialError, ConnectionError, TimeoutError."""
        async with asyncio.timeout(timeout_s):
            asking = _Asking(data)
            await self.host.transport.dial(address, lambda: asking)
            try:
                return await asking.answer
            finally:
                asking.close()


class _Whole(asyncio.BufferedProtocol):
    """Collects length-prefixed messages."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._space = bytearray(READ_BYTES)
        self._got = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._space)

    def buffer_updated(self, nbytes: int) -> None:
        self._got += self._space[:nbytes]
        while len(self._got) >= LENGTH_BYTES:
            length = int.from_bytes(self._got[:LENGTH_BYTES], "big")
            if length > ECHO_BYTES_MAX:
                self.close()
                return
            if len(self._got) < LENGTH_BYTES + length:
                return
            data = bytes(self._got[LENGTH_BYTES : LENGTH_BYTES + length])
            del self._got[: LENGTH_BYTES + length]
            self.on_message(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._space = bytearray()
        self._got.clear()

    def on_message(self, data: bytes) -> None:
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Echoing(_Whole):
    def __init__(self, host: SimHost) -> None:
        super().__init__()
        self._host = host

    def on_message(self, data: bytes) -> None:
        if self._host.condition.lie == "silent":
            return
        self.send(data[::-1] if self._host.condition.lie == "wrong" else data)


class _Asking(_Whole):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(self._data)

    def on_message(self, data: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(data)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self.answer.done():
            self.answer.set_exception(error or ConnectionResetError("closed before it answered"))
            self.answer.exception()  # whoever asked may have given up


PEER = EchoPeer
