"""Messages to frames and back: docs/protocol.md, section 1. Pure.

Every size is checked against its limit before a byte is allocated for it; each part is gathered in one buffer as its bytes
arrive, which is the one copy made here. Remote input raises ProtocolViolation and nothing else, and leaves the decoder dead.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import msgpack

from overlay.errors import ProtocolViolation
from overlay.rpc import limits
from overlay.rpc.codec import Codec, decode_planes, encode_part
from overlay.rpc.types import DTYPE_BYTES, Message, Part

PREFIX = struct.Struct(">BBHIQ")
PART_ENTRY = struct.Struct(">BBHII")
FLAG_SIGNED, FLAG_END = 1, 2
FLAGS_KNOWN = 3
PACK_BUFFER_BYTES = 1024
"""Where a header is packed; it grows when needed. The package's own choice of 256 KiB is mapped anew for every header."""
NOTHING = memoryview(b"")
UNDERSTOOD = frozenset(("k", "f", "t", "p", "nonce", "budget_ms"))
"""Header fields of this layer; a `crit` list may name these and what the layer above declares."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame."""

    message: Message
    sequence: int
    is_end: bool


def encode_header(message: Message, sender: bytes, recipient: bytes) -> bytes:
    """The msgpack map that is sent and signed. Raises ValueError when our own message breaks a limit."""
    fields: dict[str, Any] = dict(message.header)  # of a message that is passed on, it holds this layer's fields too
    fields["k"], fields["f"], fields["t"] = message.kind, sender, recipient
    if message.parts:
        fields["p"] = [[part.name, part.dtype, part.shape] for part in message.parts]
    else:
        fields.pop("p", None)
    packed: bytes = msgpack.packb(fields, buf_size=PACK_BUFFER_BYTES)
    if len(packed) > limits.HEADER_BYTES_MAX or len(message.parts) > limits.PARTS_MAX:
        raise ValueError(f"a {message.kind} message is over the limits of a frame")
    return packed


def encode_frame(
    header: bytes,
    parts: tuple[Part, ...],
    sequence: int,
    signature: bytes | None,
    *,
    end: bool = False,
    choose: Callable[[Part], Codec] | None = None,
) -> list[Buffer]:
    """Buffers to write, in order; raw parts are not copied."""
    flags = (FLAG_SIGNED if signature is not None else 0) | (FLAG_END if end else 0)
    head = bytearray(PREFIX.pack(limits.VERSION, flags, len(parts), len(header), sequence))
    if signature is not None:
        head += signature
    bodies: list[Buffer] = []
    for part in parts:
        codec = Codec.RAW if choose is None else choose(part)
        body = encode_part(part, codec)
        size = part.size_bytes
        head += PART_ENTRY.pack(codec, 0, 0, size if codec is Codec.RAW else len(body), size)
        bodies.append(body)
    return [bytes(head) + header, *bodies]


class _State(Enum):
    PREFIX = auto()
    TABLE = auto()
    HEADER = auto()
    PART = auto()
    FAILED = auto()
    REFUSED = auto()


Admit = Callable[[Mapping[str, Any], int], bool]
"""Asked with a message's header and the decoded bytes of its parts, before the first of them is read: is it wanted?"""


class FrameDecoder:
    """Bytes in any cut to frames. After a ProtocolViolation every further feed raises it again.

    A message that ``admit`` doesn't want, and all that comes after it, is dropped unread.
    """

    def __init__(
        self,
        *,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
        understood: frozenset[str] = frozenset(),
        admit: Admit | None = None,
    ) -> None:
        self._admit = admit
        self._message_bytes_max = message_bytes_max
        self._understood = UNDERSTOOD | understood if understood else UNDERSTOOD
        self._state = _State.PREFIX
        self._want = PREFIX.size
        self._gathered = bytearray()
        self._body: bytearray | None = None
        self._body_view = NOTHING
        self._body_filled = 0
        self._digest: Any = None
        self._all_digest: Any = None
        self._reset()

    def _reset(self) -> None:
        self._flags = self._part_count = self._header_length = self._sequence = 0
        self._signature: bytes | None = None
        self._entries: list[tuple[int, int, int]] = []
        self._header_bytes = b""
        self._fields: dict[str, Any] = {}
        self._described: list[tuple[str, str, tuple[int, ...]]] = []
        self._parts: list[Part] = []

    @property
    def is_idle(self) -> bool:
        """Whether the bytes so far end with a whole frame."""
        return self._state is _State.PREFIX and not self._gathered and self._body is None

    def feed(self, data: memoryview) -> list[Frame]:
        """Every frame that ``data`` completes."""
        frames: list[Frame] = []
        offset, end = 0, len(data)
        try:
            while (offset < end or not self._want) and self._state is not _State.REFUSED:
                if self._body is not None:
                    offset += self._fill_body(data[offset:])
                    if self._body_filled == self._want:
                        frame = self._step(self._end_body())
                        if frame is not None:
                            frames.append(frame)
                    continue
                take = min(self._want - len(self._gathered), end - offset)
                self._gathered += data[offset : offset + take]
                offset += take
                if len(self._gathered) < self._want:
                    break
                done, self._gathered = self._gathered, bytearray()
                frame = self._step(done)
                if frame is not None:
                    frames.append(frame)
        except ProtocolViolation:
            self._state = _State.FAILED
            self._want = 1
            raise
        return frames

    def _start_body(self, size: int) -> None:
        """Gather a raw part in a buffer of its size, hashed as it comes: one copy, one pass."""
        self._body = bytearray(size)
        self._body_view = memoryview(self._body)
        self._body_filled = 0
        self._digest = hashlib.sha256() if self._all_digest is None else self._all_digest

    def _fill_body(self, data: memoryview) -> int:
        filled = self._body_filled
        piece = data[: self._want - filled]
        self._body_view[filled : filled + len(piece)] = piece
        self._digest.update(piece)
        self._body_filled = filled + len(piece)
        return len(piece)

    def _end_body(self) -> bytearray:
        body = self._body
        assert body is not None
        self._body = None
        self._body_view = NOTHING
        return body

    def _step(self, data: bytearray) -> Frame | None:
        if self._state is _State.PREFIX:
            self._read_prefix(data)
        elif self._state is _State.TABLE:
            self._read_table(data)
        elif self._state is _State.HEADER:
            self._read_header(bytes(data))
        elif self._state is _State.PART:
            self._read_part(data)
        else:
            raise ProtocolViolation("A peer goes on after a broken message.")
        return self._finish() if self._state is _State.PART and len(self._parts) == self._part_count else None

    def _read_prefix(self, data: bytearray) -> None:
        version, self._flags, self._part_count, self._header_length, self._sequence = PREFIX.unpack(data)
        if version != limits.VERSION or self._flags & ~FLAGS_KNOWN:
            raise ProtocolViolation("A peer sent a message of an unknown version.")
        if self._part_count > limits.PARTS_MAX or not 0 < self._header_length <= limits.HEADER_BYTES_MAX:
            raise ProtocolViolation("A peer sent a message with too many parts or a header of a bad size.")
        signature = limits.SIGNATURE_BYTES if self._flags & FLAG_SIGNED else 0
        self._want = signature + PART_ENTRY.size * self._part_count
        self._state = _State.TABLE
        if not self._want:
            self._read_table(bytearray())

    def _read_table(self, data: bytearray) -> None:
        offset = 0
        if self._flags & FLAG_SIGNED:
            self._signature = bytes(data[: limits.SIGNATURE_BYTES])
            offset = limits.SIGNATURE_BYTES
        total = 0
        for index in range(self._part_count):
            codec, zero, zeros, encoded, decoded = PART_ENTRY.unpack_from(data, offset + index * PART_ENTRY.size)
            total += max(encoded, decoded)
            if max(encoded, decoded) > limits.PART_BYTES_MAX or total > self._message_bytes_max:
                raise ProtocolViolation("A peer sent a tensor over the size limit.")
            if zero or zeros:
                raise ProtocolViolation("A peer fills what the format reserves.")
            if codec not in (Codec.RAW, Codec.PLANES_ZSTD) or (codec == Codec.RAW and encoded != decoded):
                raise ProtocolViolation("A peer sent a tensor in an unknown codec.")
            self._entries.append((codec, encoded, decoded))
        self._all_digest = hashlib.sha256() if self._part_count > 1 else None
        self._want = self._header_length
        self._state = _State.HEADER

    def _read_header(self, data: bytes) -> None:
        self._header_bytes = data
        self._fields = unpack_header(data)
        critical = self._fields.get("crit", [])
        if not isinstance(critical, list) or any(name not in self._understood for name in critical):
            raise ProtocolViolation("A peer needs a feature that this version doesn't have; upgrade peerd.")
        self._described = _describe(self._fields.get("p", []), [decoded for _, _, decoded in self._entries])
        if self._admit is not None and not self._admit(self._fields, sum(decoded for _, _, decoded in self._entries)):
            self._state = _State.REFUSED
            return
        self._state = _State.PART
        self._next_part()

    def _next_part(self) -> None:
        while len(self._parts) < self._part_count:
            codec, self._want, _ = self._entries[len(self._parts)]
            if self._want:
                if codec == Codec.RAW and self._want <= limits.BODY_AT_ONCE_BYTES:
                    self._start_body(self._want)
                return
            self._add_part(bytearray())
        self._want = PREFIX.size

    def _read_part(self, data: bytearray) -> None:
        self._add_part(data)
        self._next_part()

    def _add_part(self, data: bytearray) -> None:
        codec, _, decoded = self._entries[len(self._parts)]
        name, dtype, shape = self._described[len(self._parts)]
        body: Buffer = data
        if codec == Codec.PLANES_ZSTD:
            body = decode_planes(data, DTYPE_BYTES[dtype], decoded)
        digest = None
        if self._all_digest is None:
            digest = None if self._digest is None else self._digest.digest()
        elif self._digest is None:
            self._all_digest.update(body)
        self._digest = None
        self._parts.append(Part(name, dtype, shape, body, digest))

    def _finish(self) -> Frame:
        fields = self._fields
        message = Message(
            fields["k"],
            fields,
            tuple(self._parts),
            fields["f"],
            fields["t"],
            self._header_bytes,
            self._signature,
            None if self._all_digest is None else self._all_digest.digest(),
        )
        self._all_digest = None
        frame = Frame(message, self._sequence, bool(self._flags & FLAG_END))
        self._reset()
        self._state = _State.PREFIX
        self._want = PREFIX.size
        return frame


def unpack_header(data: bytes) -> dict[str, Any]:
    """The header's map, bounded. Raises ProtocolViolation."""
    size = len(data)
    items = min(size, limits.HEADER_ITEMS_MAX)
    try:
        fields = msgpack.unpackb(
            data,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=items,
            max_map_len=items,
            max_ext_len=0,
            strict_map_key=True,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolViolation("A peer sent a message header that can't be read.") from error
    if not isinstance(fields, dict):
        raise ProtocolViolation("A peer sent a message header that is no map.")
    kind, sender, recipient = fields.get("k"), fields.get("f"), fields.get("t")
    if not isinstance(kind, str) or len(kind) > limits.KIND_CHARS_MAX:
        raise ProtocolViolation("A peer sent a message without a kind.")
    if not isinstance(sender, bytes) or not isinstance(recipient, bytes):
        raise ProtocolViolation("A peer sent a message without a sender or a recipient.")
    return fields


def _describe(listed: object, sizes: Sequence[int]) -> list[tuple[str, str, tuple[int, ...]]]:
    if not isinstance(listed, list) or len(listed) != len(sizes):
        raise ProtocolViolation("A peer describes other tensors than it sends.")
    described = []
    for entry, size in zip(listed, sizes, strict=True):
        if not isinstance(entry, list) or len(entry) != 3:
            raise ProtocolViolation("A peer describes a tensor badly.")
        name, dtype, shape = entry
        if not isinstance(name, str) or len(name) > limits.PART_NAME_CHARS_MAX or not isinstance(dtype, str):
            raise ProtocolViolation("A peer describes a tensor badly.")
        if dtype not in DTYPE_BYTES or not isinstance(shape, list) or len(shape) > limits.DIMENSIONS_MAX:
            raise ProtocolViolation("A peer sent a tensor of an unknown type or shape.")
        count = DTYPE_BYTES[dtype]
        for length in shape:
            if type(length) is not int or not 0 <= length <= limits.PART_BYTES_MAX:
                raise ProtocolViolation("A peer sent a tensor of a bad shape.")
            count *= length
        if count != size:
            raise ProtocolViolation("A peer sent a tensor whose size is not its shape's.")
        described.append((name, dtype, tuple(shape)))
    return described


def header_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The kind's own fields, without this layer's."""
    return {name: value for name, value in fields.items() if name not in ("k", "f", "t", "p", "crit")}
