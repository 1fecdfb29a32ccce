"""multistream-select 1.0, both roles, pipelined (libp2p specs: connections/README). Pure.

Owns the negotiation of one pipe. Bytes after the answer belong to the protocol: they stay in `rest`.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from functools import lru_cache

from overlay.errors import ProtocolRefused, ProtocolViolation
from overlay.varint import decode_varint, encode_varint

HEADER = "/multistream/1.0.0"
REFUSAL = "na"
MESSAGE_BYTES_MAX = 1024
PROPOSALS_MAX = 16
LINES_CACHED = 256


@lru_cache(maxsize=LINES_CACHED)
def encode_line(text: str) -> bytes:
    """One message: length, text, newline."""
    body = text.encode() + b"\n"
    return encode_varint(len(body)) + body


HEADER_LINE = encode_line(HEADER)
REFUSAL_LINE = encode_line(REFUSAL)


def proposal(protocol: str) -> bytes:
    """What an initiator sends in one write: header and proposal."""
    return HEADER_LINE + encode_line(protocol)


class _State(Enum):
    HEADER = auto()
    ANSWER = auto()
    DONE = auto()
    FAILED = auto()


class _Lines:
    """Splits bytes into messages, bounded."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def check_header(self) -> None:
        """What can't become the header is refused at its first wrong byte, not when a length that it isn't is full."""
        if not HEADER_LINE.startswith(bytes(self.buffer[: len(HEADER_LINE)])):
            raise ProtocolViolation("A peer speaks another negotiation than multistream 1.0.")

    def next_line(self) -> str | None:
        decoded = decode_varint(self.buffer[:3])
        if decoded is None:
            if len(self.buffer) >= 3:
                raise ProtocolViolation("A peer sent a protocol name that is too long.")
            return None
        length, offset = decoded
        if not 0 < length <= MESSAGE_BYTES_MAX:
            raise ProtocolViolation("A peer sent a protocol name of a bad length.")
        if len(self.buffer) < offset + length:
            return None
        raw = bytes(self.buffer[offset : offset + length])
        del self.buffer[: offset + length]
        if not raw.endswith(b"\n"):
            raise ProtocolViolation("A peer sent a protocol name without its newline.")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as error:
            raise ProtocolViolation("A peer sent a protocol name that is no text.") from error


class Initiator:
    """Proposes one protocol. ``receive`` returns True once it was accepted.

    Raises ProtocolRefused when the peer doesn't speak it, ProtocolViolation on garbage.
    """

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._lines = _Lines()
        self._state = _State.HEADER

    def receive(self, data: bytes | memoryview) -> bool:
        self._lines.buffer += data
        if self._state is _State.HEADER:
            accepted = HEADER_LINE + encode_line(self.protocol)
            if self._lines.buffer.startswith(accepted):  # all in one piece, as nearly always
                del self._lines.buffer[: len(accepted)]
                self._state = _State.DONE
                return True
            self._lines.check_header()
        while self._state is not _State.DONE:
            line = self._lines.next_line()
            if line is None:
                return False
            if self._state is _State.HEADER:
                self._state = _State.ANSWER
            elif line == self.protocol:
                self._state = _State.DONE
            else:
                self._state = _State.FAILED
                if line == REFUSAL:
                    raise ProtocolRefused(f"The peer doesn't speak {self.protocol}; it may run an older version.")
                raise ProtocolViolation("A peer answered with a protocol that was not proposed.")
        return True

    @property
    def rest(self) -> bytes:
        """Bytes after the answer: the protocol's."""
        return bytes(self._lines.buffer)


class Responder:
    """Answers proposals from what is served. ``receive`` returns bytes to send; ``chosen`` is set at the end."""

    def __init__(self, served: Collection[str]) -> None:
        self._served = served
        self._lines = _Lines()
        self._state = _State.HEADER
        self._proposals = 0
        self.chosen: str | None = None

    def receive(self, data: bytes | memoryview) -> bytes:
        self._lines.buffer += data
        if self._state is _State.HEADER:
            self._lines.check_header()
        out = b""
        while self.chosen is None:
            line = self._lines.next_line()
            if line is None:
                break
            if self._state is _State.HEADER:
                self._state = _State.ANSWER
                out += HEADER_LINE
                continue
            self._proposals += 1
            if self._proposals > PROPOSALS_MAX:
                self._state = _State.FAILED
                raise ProtocolViolation("A peer proposed too many protocols.")
            if line in self._served:
                self._state = _State.DONE
                self.chosen = line
                out += encode_line(line)
            else:
                out += REFUSAL_LINE
        return out

    @property
    def rest(self) -> bytes:
        """Bytes after the answer: the protocol's."""
        return bytes(self._lines.buffer)
