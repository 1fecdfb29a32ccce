"""A stranger that speaks every layer correctly up to a chosen point, and garbage from there: as dialler, and as who is dialled.

Owns the ways to be wrong. It runs production's own upgrade and breaks what that writes, so that garbage reaches every layer: bytes on
TCP, multistream, the handshake, sealed messages, yamux frames, rpc frames. Knows nothing of what its victims should do about it.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - seeded generators, never the global one
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, cast

from netsim.listening_peer import ListeningPeer
from netsim.null_channel import null_channel
from netsim.peers.bare import CALL
from netsim.sim_host import SimHost
from overlay.errors import PeerdError
from overlay.host import Meeting, secure_with_noise
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.multistream import proposal
from overlay.rpc.frame import encode_frame, encode_header
from overlay.rpc.signing import sign
from overlay.rpc.types import Message
from overlay.upgrade import Upgrade
from overlay.yamux.session import FLAG_SYN, FLAGS_KNOWN, HEADER, TYPE_DATA, TYPE_GOAWAY, TYPE_WINDOW

BUFFER_BYTES = 64 << 10
PATIENCE_S = 20.0
"""So long it waits to be thrown out."""
FRAMES_MAX = 40
ENDLESS_BYTES = 100_000
"""More than any message that their first two bytes could begin."""
BODY_BYTES_MAX = 2000
NONCE_BYTES = 16


class Layer(IntEnum):
    """Where the garbage begins: the first two are also the numbers of the write that is broken."""

    FIRST_WRITE = 0
    """Multistream and the first handshake message; or, of who is dialled, the answers to them."""
    SECOND_WRITE = 1
    """The rest of the handshake."""
    SEALED = 2
    YAMUX = 3
    RPC = 4


GREETINGS = (Layer.FIRST_WRITE, Layer.FIRST_WRITE, Layer.FIRST_WRITE, Layer.SEALED, Layer.YAMUX, Layer.RPC)
"""What who dials meets; the handshake of who is dialled has one write."""


class Harm(IntEnum):
    """What becomes of a write."""

    RANDOM = 0
    FLIPPED = 1
    TRUNCATED = 2
    TWICE = 3
    SILENT = 4
    ENDLESS = 5


@dataclass(frozen=True, slots=True)
class GarblerSettings:
    """It is told nothing."""


class GarblerPeer(ListeningPeer):
    """`netsim.peers.Peer`; workloads call `attack`, and dial it."""

    SETTINGS: ClassVar[type[GarblerSettings]] = GarblerSettings

    def __init__(self, host: SimHost, settings: GarblerSettings) -> None:
        super().__init__(host)
        self._draws = host.random("garbage")
        self.identity = Identity.load_or_create(host.storage, host.ports.randomness)

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        return (self.host.listen_address,)

    def greet(self) -> Garbler:
        layer = self._draws.choice(GREETINGS)
        return Garbler(self._upgrade(None), self.identity, None, layer, self._draws, is_dialler=False)

    def _upgrade(self, expected: PeerId | None, *, is_dialler: bool = False) -> Upgrade:
        secure = secure_with_noise if self.host.world.is_noise else null_channel
        meeting = Meeting(self.identity, is_dialler, expected, b"")
        return Upgrade(secure(meeting, self.host.ports.randomness), initiator=is_dialler)

    async def attack(self, victim: PeerId, address: Multiaddr, layer: Layer) -> float | None:
        """Seconds until the victim ended the connection, or None: it bore with it. Raises DialError."""
        garbler = Garbler(
            self._upgrade(victim, is_dialler=True), self.identity, victim, layer, self._draws, is_dialler=True
        )
        await self.host.transport.dial(address, lambda: garbler)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await garbler.ended.wait()
        except TimeoutError:
            return None
        finally:
            garbler.close()
        return loop.time() - began_s


class Garbler(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(
        self,
        upgrade: Upgrade,
        identity: Identity,
        victim: PeerId | None,
        layer: Layer,
        draws: random.Random,
        *,
        is_dialler: bool,
    ) -> None:
        self._upgrade = upgrade
        self._identity = identity
        self._victim = victim
        self.layer = layer
        self._draws = draws
        self._is_dialler = is_dialler
        self._space = memoryview(bytearray(BUFFER_BYTES))
        self._transport: asyncio.Transport | None = None
        self._writes = 0
        self._is_over = False
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._is_dialler:
            self._send(self._upgrade.start())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_over:
            return
        try:
            answer = self._upgrade.receive(self._space[:nbytes])
        except PeerdError:  # the victim took the garbage for something and answered that
            self._is_over = True
            return
        if answer:
            self._send(answer)
        if self._upgrade.is_done and not self._is_over:
            self._is_over = True
            self._write(self._beyond())

    def eof_received(self) -> None:
        self.ended.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.ended.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def _send(self, data: bytes) -> None:
        """A write of the upgrade's, broken if it is the one."""
        number, self._writes = self._writes, self._writes + 1
        if number != self.layer:
            self._write(data)
            return
        self._is_over = True
        self._write(self._broken(data, self._draws.choice(list(Harm))))

    def _broken(self, data: bytes, harm: Harm) -> bytes:
        draws = self._draws
        if harm is Harm.RANDOM:
            return draws.randbytes(len(data))
        if harm is Harm.FLIPPED:
            at = draws.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << draws.randrange(8)]) + data[at + 1 :]
        if harm is Harm.TRUNCATED:
            return data[: draws.randrange(len(data))]
        if harm is Harm.TWICE:
            return data + data
        return b"" if harm is Harm.SILENT else data + draws.randbytes(ENDLESS_BYTES)

    # --- beyond the upgrade ---

    def _beyond(self) -> bytes:
        result = self._upgrade.result
        assert result is not None
        if self.layer is Layer.SEALED:
            sealed = bytes(result.sender.seal_framed(HEADER.pack(0, 2, FLAG_SYN, 0, 1)))
            at = self._draws.randrange(2, len(sealed))
            return sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        plain = self._frames() if self.layer is Layer.YAMUX else self._rpc()
        return bytes(result.sender.seal_framed(plain))

    def _frames(self) -> bytes:
        """Headers that are nearly right, with bodies that are nearly as long as they say."""
        draws, out = self._draws, bytearray()
        for _ in range(draws.randrange(1, FRAMES_MAX)):
            if draws.random() < 0.1:
                out += draws.randbytes(HEADER.size)
                continue
            kind, flags = draws.randrange(TYPE_GOAWAY + 1), draws.randrange(FLAGS_KNOWN + 1)
            stream = draws.choice((0, 1, 2, 3, 5, 7, 2**31, 2**32 - 1))
            length = draws.choice((0, 1, draws.randrange(BODY_BYTES_MAX), 2**20, 2**32 - 1))
            out += HEADER.pack(0, kind, flags, stream, length)
            if kind == TYPE_DATA:
                out += draws.randbytes(min(length, draws.randrange(BODY_BYTES_MAX)))
        return bytes(out[:60_000])

    def _rpc(self) -> bytes:
        """A call that is opened as it should be, with a frame that is random or a little wrong."""
        stream = 1 if self._is_dialler else 2
        frame = bytearray(self._draws.randbytes(self._draws.randrange(1, BODY_BYTES_MAX)))
        if self._victim is not None and self._draws.random() < 0.8:
            message = Message("echo", {"text": "x", "nonce": self._draws.randbytes(NONCE_BYTES)})
            header = encode_header(message, self._identity.peer_id.multihash, self._victim.multihash)
            frame = bytearray(b"".join(encode_frame(header, (), 0, sign(self._identity, header, ()), end=True)))
            for _ in range(self._draws.randrange(1, 4)):
                frame[self._draws.randrange(len(frame))] = self._draws.randrange(256)
        opening = proposal(CALL)
        return (
            HEADER.pack(0, TYPE_WINDOW, FLAG_SYN, stream, 0)
            + HEADER.pack(0, TYPE_DATA, 0, stream, len(opening) + len(frame))
            + opening
            + frame
        )


PEER = GarblerPeer
