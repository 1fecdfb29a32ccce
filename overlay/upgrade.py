"""From a raw byte pipe to a secured, multiplexed one: multistream `/noise`, Noise XX, then yamux. Pure.

Follows libp2p specs: connections/README and connections/inlined-muxer-negotiation. Pipelined: the initiator sends header, proposal
and first handshake message in one write, and the muxer rides in the handshake where both sides can.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from overlay.errors import PeerdError, UpgradeError
from overlay.multistream import Initiator, Responder, proposal
from overlay.noise.handshake import HANDSHAKE_MESSAGE_BYTES_MAX, HandshakeResult

NOISE = "/noise"
YAMUX = "/yamux/1.0.0"
UPGRADE_BYTES_MAX = 16 << 10


class Securing(Protocol):
    """A handshake over whole messages: `overlay.noise.handshake.Handshake`, or what stands for it."""

    result: HandshakeResult | None

    @property
    def wants_to_write(self) -> bool: ...
    def write(self) -> bytes: ...
    def read(self, message: bytes) -> None: ...


class _State(Enum):
    SECURITY = auto()
    HANDSHAKE = auto()
    MUXER = auto()
    DONE = auto()


class Upgrade:
    """One side of an upgrade. `start` and `receive` return bytes to send; `result` is set at the end, `rest` is what follows it."""

    def __init__(self, handshake: Securing, *, initiator: bool) -> None:
        self._handshake = handshake
        self._initiator = initiator
        self._security = Initiator(NOISE) if initiator else Responder((NOISE,))
        self._muxer = Initiator(YAMUX) if initiator else Responder((YAMUX,))
        self._buffer = bytearray()
        self._state = _State.SECURITY
        self._received_bytes = 0
        self.result: HandshakeResult | None = None

    def start(self) -> bytes:
        """The first bytes to send (none for the responder)."""
        return proposal(NOISE) + _framed(self._handshake.write()) if self._initiator else b""

    @property
    def is_done(self) -> bool:
        return self._state is _State.DONE

    @property
    def rest(self) -> bytes:
        """Sealed bytes that came after the upgrade."""
        return bytes(self._buffer)

    def receive(self, data: memoryview) -> bytes:
        """Take bytes in any cut. Raises UpgradeError, whatever the peer sent."""
        self._received_bytes += len(data)
        if (
            self._received_bytes > UPGRADE_BYTES_MAX
            and self._state is not _State.DONE
            and len(data) < self._received_bytes
        ):
            raise UpgradeError("The other side sends too much before the connection is secured.")
        try:
            return self._advance(data)
        except UpgradeError:
            raise
        except PeerdError as error:
            raise UpgradeError(f"The other side is no peerd node, or an incompatible one: {error}") from error

    def _advance(self, data: memoryview) -> bytes:
        out = b""
        if self._state is _State.SECURITY:
            if isinstance(self._security, Initiator):
                chosen = self._security.receive(data)
            else:
                out += self._security.receive(data)
                chosen = self._security.chosen is not None
            if not chosen:
                return out
            self._buffer += self._security.rest
            self._state = _State.HANDSHAKE
        else:
            self._buffer += data
        while self._state in (_State.HANDSHAKE, _State.MUXER):
            message = self._next_message()
            if message is None:
                break
            out += self._take(message)
        return out

    def _next_message(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        length = self._buffer[0] << 8 | self._buffer[1]
        if self._state is _State.HANDSHAKE and length > HANDSHAKE_MESSAGE_BYTES_MAX:
            raise UpgradeError("The other side sent a handshake message that is too long.")
        if len(self._buffer) < 2 + length:
            return None
        message = bytes(self._buffer[2 : 2 + length])
        del self._buffer[: 2 + length]
        return message

    def _take(self, message: bytes) -> bytes:
        if self._state is _State.HANDSHAKE:
            self._handshake.read(message)
            out = _framed(self._handshake.write()) if self._handshake.wants_to_write else b""
            if self._handshake.result is not None:
                out += self._secured(self._handshake.result)
            return out
        assert self.result is not None
        plain = memoryview(self.result.receiver.open(message))
        if isinstance(self._muxer, Initiator):
            if self._muxer.receive(plain):
                self._state = _State.DONE
            return b""
        answer = self._muxer.receive(plain)
        if self._muxer.chosen is not None:
            self._state = _State.DONE
        return _framed(self.result.sender.seal(answer)) if answer else b""

    def _secured(self, result: HandshakeResult) -> bytes:
        self.result = result
        if YAMUX in result.remote_muxers:
            self._state = _State.DONE
            return b""
        if result.remote_muxers:
            raise UpgradeError("The other side offers no multiplexer that is known here.")
        self._state = _State.MUXER
        return _framed(result.sender.seal(proposal(YAMUX))) if self._initiator else b""


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message
