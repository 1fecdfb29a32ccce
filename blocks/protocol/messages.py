"""Session messages as values, and their strict reading from `overlay.rpc.types.Message`.

Owns the field names of `docs/protocol.md` section 3 and the bounds of every field. Knows nothing of sessions'
states: whether a message is welcome is the business of the machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from blocks.protocol import limits
from blocks.protocol.fields import (
    read_bytes,
    read_integer,
    read_list,
    read_number,
    read_optional_number,
    read_text,
)
from blocks.protocol.session_errors import BadMessage
from overlay.rpc.types import Message, Part
from routing.types import MODEL_ID_BYTES, Hop, ModelId, Span

Header = Mapping[str, Any]

Want = Literal["none", "last", "all"] | tuple[int, int]
"""The rows that a window's result carries; a pair is a half-open range of absolute positions."""


class Epoch(NamedTuple):
    """(driver incarnation, counter): compared as a pair, raised for every route."""

    incarnation: int
    counter: int


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every session message says: ``hop_index`` is whom it is for (to a hop) or from (to the driver)."""

    KIND: ClassVar[str] = ""

    session: bytes
    epoch: Epoch
    hop_index: int

    def header(self) -> dict[str, Any]:
        """The fields as msgpack carries them."""
        return {"s": self.session, "e": list(self.epoch), "h": self.hop_index}

    def to_message(self, sender: bytes, recipient: bytes) -> Message:
        return Message(self.KIND, self.header(), (), sender, recipient)


@dataclass(frozen=True, slots=True)
class Open(Envelope):
    """Driver to hop: take this place in this route, with empty KV."""

    KIND: ClassVar[str] = "open"

    model: ModelId
    compute_class: str
    adapter: str
    route: tuple[Hop, ...]
    driver_addresses: tuple[str, ...]
    max_tokens: int
    heartbeat_s: float
    lease_s: float

    def header(self) -> dict[str, Any]:
        return {
            "s": self.session,
            "e": list(self.epoch),
            "h": self.hop_index,
            "model": bytes(self.model),
            "class": self.compute_class,
            "adapter": self.adapter,
            "route": [[hop.peer, list(hop.addresses), hop.span.start, hop.span.end] for hop in self.route],
            "driver": list(self.driver_addresses),
            "max_tokens": self.max_tokens,
            "heartbeat_s": self.heartbeat_s,
            "lease_s": self.lease_s,
        }


@dataclass(frozen=True, slots=True)
class Ready(Envelope):
    """Hop to driver: the place is taken; W windows and B bytes may be under way."""

    KIND: ClassVar[str] = "ready"

    boot_id: bytes
    kv_have: tuple[tuple[int, int], ...]
    journal_from: int
    windows: int
    window_bytes: int
    rollback_tokens: int

    def header(self) -> dict[str, Any]:
        return {
            "s": self.session,
            "e": list(self.epoch),
            "h": self.hop_index,
            "boot": self.boot_id,
            "kv_have": [list(pair) for pair in self.kv_have],
            "journal_from": self.journal_from,
            "windows": self.windows,
            "bytes": self.window_bytes,
            "rollback_tokens": self.rollback_tokens,
        }


@dataclass(frozen=True, slots=True)
class Window(Envelope):
    """New tokens on their way through the ring; cancelled ones travel on without ``hidden``.

    ``hidden`` has shape (tokens, d_model). ``input_digest`` is what the *sender* of this window received for the
    turn (SHA-256), None from the driver, which received nothing.
    """

    KIND: ClassVar[str] = "window"

    branch: int
    turn: int
    position: int
    tokens: int
    want: Want
    model: ModelId
    compute_class: str
    adapter: str
    input_digest: bytes | None
    hidden: Part | None

    @property
    def cancelled(self) -> bool:
        return self.hidden is None

    def header(self) -> dict[str, Any]:
        header = _window_header(self)
        if self.hidden is None:
            header["x"] = True
        return header

    def to_message(self, sender: bytes, recipient: bytes) -> Message:
        parts = () if self.hidden is None else (self.hidden,)
        return Message("window", self.header(), parts, sender, recipient)


@dataclass(frozen=True, slots=True)
class Result(Envelope):
    """Last hop to driver: the rows wanted of one turn; one for every window, so that its credit comes back."""

    KIND: ClassVar[str] = "result"

    branch: int
    turn: int
    position: int
    tokens: int
    want: Want
    model: ModelId
    compute_class: str
    adapter: str
    input_digest: bytes | None
    hidden: Part | None
    cancelled: bool = False

    def header(self) -> dict[str, Any]:
        header = _window_header(self)
        if self.cancelled:
            header["x"] = True
        return header

    def to_message(self, sender: bytes, recipient: bytes) -> Message:
        parts = () if self.hidden is None else (self.hidden,)
        return Message("result", self.header(), parts, sender, recipient)


def _window_header(lane: Window | Result) -> dict[str, Any]:
    header: dict[str, Any] = {
        "s": lane.session,
        "e": list(lane.epoch),
        "h": lane.hop_index,
        "b": lane.branch,
        "n": lane.turn,
        "o": lane.position,
        "c": lane.tokens,
        "w": lane.want if isinstance(lane.want, str) else list(lane.want),
        "m": lane.model,
        "cc": lane.compute_class,
        "a": lane.adapter,
    }
    if lane.input_digest is not None:
        header["digest"] = lane.input_digest
    return header


@dataclass(frozen=True, slots=True)
class Gap(Envelope):
    """Hop to driver and predecessor: turn ``turn`` starts beyond the ``have`` tokens held."""

    KIND: ClassVar[str] = "gap"

    branch: int
    turn: int
    have: int

    def header(self) -> dict[str, Any]:
        return {
            "s": self.session,
            "e": list(self.epoch),
            "h": self.hop_index,
            "b": self.branch,
            "n": self.turn,
            "have": self.have,
        }


@dataclass(frozen=True, slots=True)
class Cancel(Envelope):
    """Driver to hop: no window with a turn up to ``turn`` is to be started any more."""

    KIND: ClassVar[str] = "cancel"

    turn: int

    def header(self) -> dict[str, Any]:
        return {"s": self.session, "e": list(self.epoch), "h": self.hop_index, "n": self.turn}


@dataclass(frozen=True, slots=True)
class Heartbeat(Envelope):
    """Either way. From a driver ``boot_id`` is None and it only renews the lease."""

    KIND: ClassVar[str] = "heartbeat"

    boot_id: bytes | None = None
    steps: int = 0
    queue: int = 0
    oldest_s: float | None = None

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"s": self.session, "e": list(self.epoch), "h": self.hop_index}
        if self.boot_id is not None:
            header |= {"boot": self.boot_id, "steps": self.steps, "queue": self.queue, "oldest_s": self.oldest_s}
        return header


@dataclass(frozen=True, slots=True)
class Report(Envelope):
    """Hop to driver: the edge to hop ``edge`` is dead, or what came over it was refused (``code`` says)."""

    KIND: ClassVar[str] = "report"

    edge: int
    code: str
    message: str

    def header(self) -> dict[str, Any]:
        return {
            "s": self.session,
            "e": list(self.epoch),
            "h": self.hop_index,
            "edge": self.edge,
            "code": self.code,
            "message": self.message[: limits.TEXT_CHARS_MAX],
        }


@dataclass(frozen=True, slots=True)
class Leaving(Envelope):
    """Hop to driver: this hop serves for ``deadline_s`` more seconds."""

    KIND: ClassVar[str] = "leaving"

    deadline_s: float

    def header(self) -> dict[str, Any]:
        return {"s": self.session, "e": list(self.epoch), "h": self.hop_index, "deadline_s": self.deadline_s}


@dataclass(frozen=True, slots=True)
class Close(Envelope):
    """Driver to hop: the session leaves this hop; its KV is freed."""

    KIND: ClassVar[str] = "close"


@dataclass(frozen=True, slots=True)
class SessionError(Envelope):
    """Hop to driver (or to its predecessor, for a window): something was refused or failed."""

    KIND: ClassVar[str] = "error"

    code: str
    message: str
    retryable: bool = False
    retry_after_s: float | None = None
    turn: int | None = None

    def header(self) -> dict[str, Any]:
        return {
            "s": self.session,
            "e": list(self.epoch),
            "h": self.hop_index,
            "code": self.code,
            "message": self.message[: limits.TEXT_CHARS_MAX],
            "retryable": self.retryable,
            "retry_after_s": self.retry_after_s,
            "n": self.turn,
        }


@dataclass(frozen=True, slots=True)
class Reserved(Envelope):
    """`route`, `replay`, `bridge`, `fork`: named in the tables, refused with `unsupported` in this version."""

    kind: str

    def to_message(self, sender: bytes, recipient: bytes) -> Message:
        return Message(self.kind, self.header(), (), sender, recipient)


SessionMessage = (
    Open
    | Ready
    | Window
    | Result
    | Gap
    | Cancel
    | Heartbeat
    | Report
    | Leaving
    | Close
    | SessionError
    | Reserved
)

RESERVED_KINDS = ("route", "replay", "bridge", "fork")


def decode(message: Message) -> SessionMessage:
    """Read a session message; raises only `BadMessage`, with the reason, whatever the peer sent."""
    reader = _READERS.get(message.kind)
    if reader is None:
        raise BadMessage(f"{message.kind[:32]!r} is no kind of session message")
    header = message.header
    session = header.get("s")
    if type(session) is not bytes or len(session) != limits.SESSION_ID_BYTES:
        raise BadMessage("a session id is 16 bytes")
    pair = header.get("e")
    if type(pair) not in (list, tuple) or len(pair) != 2:  # type: ignore[arg-type]
        raise BadMessage("an epoch is a pair of integers")
    incarnation, counter = pair  # type: ignore[misc]
    if type(incarnation) is not int or type(counter) is not int:
        raise BadMessage("an epoch is a pair of integers")
    if not (0 <= incarnation <= limits.COUNTER_MAX and 0 <= counter <= limits.COUNTER_MAX):
        raise BadMessage("an epoch is out of range")
    hop_index = read_integer(header, "h", 0, limits.ROUTE_HOPS_MAX - 1)
    return reader(message, session, Epoch(incarnation, counter), hop_index)


def _read_want(header: Header, position: int, tokens: int) -> Want:
    want = header.get("w")
    if want == "last" or want == "none" or want == "all":  # noqa: PLR1714 (a tuple test is slower, on the hot path)
        return want  # type: ignore[no-any-return]
    if type(want) is list and len(want) == 2 and type(want[0]) is int and type(want[1]) is int:
        if position <= want[0] < want[1] <= position + tokens:
            return (want[0], want[1])
        raise BadMessage("the rows wanted lie outside the window")
    raise BadMessage("want is none, last, all or a range of positions")


def _one_part(message: Message) -> Part | None:
    if len(message.parts) > 1:
        raise BadMessage("a window has one part at most")
    if not message.parts:
        return None
    part = message.parts[0]
    if part.name != "hidden" or len(part.shape) != 2 or part.size_bytes != len(part.data):
        raise BadMessage("the part of a window is hidden, of shape (tokens, d_model)")
    return part


def _lane_fields(header: Header) -> tuple[int, int, int, int, Want, ModelId, str, str, bytes | None]:
    branch = read_integer(header, "b", 0, limits.BRANCHES_MAX - 1)
    turn = read_integer(header, "n", 1, limits.COUNTER_MAX)
    position = read_integer(header, "o", 0, limits.CONTEXT_TOKENS_MAX)
    tokens = read_integer(header, "c", 1, limits.WINDOW_TOKENS_MAX)
    digest = header.get("digest")
    if digest is not None and (type(digest) is not bytes or len(digest) != limits.DIGEST_BYTES):
        raise BadMessage("a digest is 32 bytes")
    return (
        branch,
        turn,
        position,
        tokens,
        _read_want(header, position, tokens),
        ModelId(read_bytes(header, "m", MODEL_ID_BYTES)),
        read_text(header, "cc", limits.NAME_CHARS_MAX),
        read_text(header, "a", limits.NAME_CHARS_MAX),
        digest,
    )


def _read_window(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Window:
    fields = _lane_fields(message.header)
    hidden = _one_part(message)
    if (message.header.get("x") is True) != (hidden is None):
        raise BadMessage("a window has its hidden part, unless it was cancelled")
    if hidden is not None and hidden.shape[0] != fields[3]:
        raise BadMessage("a window has one row per token")
    return Window(session, epoch, hop_index, *fields, hidden)


def _read_result(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Result:
    fields = _lane_fields(message.header)
    hidden = _one_part(message)
    cancelled = message.header.get("x") is True
    rows = 0 if cancelled else wanted_rows(fields[4], fields[3])
    if (0 if hidden is None else hidden.shape[0]) != rows:
        raise BadMessage("a result has the rows that were wanted")
    return Result(session, epoch, hop_index, *fields, hidden, cancelled)


def wanted_rows(want: Want, tokens: int) -> int:
    """How many rows the result of a window of ``tokens`` carries."""
    if want == "last":
        return 1
    if want == "none":
        return 0
    return tokens if want == "all" else want[1] - want[0]


def _read_open(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Open:
    header = message.header
    entries = read_list(header, "route", limits.ROUTE_HOPS_MAX)
    route = tuple(_read_hop(entry) for entry in entries)
    if not route or route[0].span.start != 0 or hop_index >= len(route):
        raise BadMessage("a route starts at block 0 and has the hop that it is sent to")
    for before, after in zip(route, route[1:], strict=False):
        if before.span.end != after.span.start:
            raise BadMessage("a route has no gaps")
    return Open(
        session,
        epoch,
        hop_index,
        ModelId(read_bytes(header, "model", MODEL_ID_BYTES)),
        read_text(header, "class", limits.NAME_CHARS_MAX),
        read_text(header, "adapter", limits.NAME_CHARS_MAX),
        route,
        _read_addresses(header.get("driver")),
        read_integer(header, "max_tokens", 1, limits.CONTEXT_TOKENS_MAX),
        read_number(header, "heartbeat_s", limits.HEARTBEAT_S_MIN, limits.HEARTBEAT_S_MAX),
        read_number(header, "lease_s", 0.0, limits.DURATION_S_MAX),
    )


def _read_addresses(value: object) -> tuple[str, ...]:
    if type(value) is not list or len(value) > limits.HOP_ADDRESSES_MAX:
        raise BadMessage("addresses are a short list")
    for address in value:
        if type(address) is not str or len(address) > limits.ADDRESS_CHARS_MAX:
            raise BadMessage("an address is a short text")
    return tuple(value)


def _read_hop(entry: object) -> Hop:
    if type(entry) is not list or len(entry) != 4:
        raise BadMessage("a hop of a route is [peer, addresses, start, end]")
    peer, addresses, start, end = entry
    if type(peer) is not bytes or not 0 < len(peer) <= limits.PEER_ID_BYTES_MAX:
        raise BadMessage("a hop's peer is a peer id")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= limits.BLOCKS_MAX:
        raise BadMessage("a hop's span is out of range")
    return Hop(peer, _read_addresses(addresses), Span(start, end))


def _read_ready(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Ready:
    header = message.header
    pairs = read_list(header, "kv_have", limits.BRANCHES_MAX)
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
            raise BadMessage("kv_have is a list of [branch, tokens]")
    return Ready(
        session,
        epoch,
        hop_index,
        read_bytes(header, "boot", limits.BOOT_ID_BYTES),
        tuple((pair[0], pair[1]) for pair in pairs),
        read_integer(header, "journal_from", 0, limits.CONTEXT_TOKENS_MAX),
        read_integer(header, "windows", 1, limits.COUNTER_MAX),
        read_integer(header, "bytes", 1, limits.COUNTER_MAX),
        read_integer(header, "rollback_tokens", 0, limits.COUNTER_MAX),
    )


def _read_gap(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Gap:
    header = message.header
    return Gap(
        session,
        epoch,
        hop_index,
        read_integer(header, "b", 0, limits.BRANCHES_MAX - 1),
        read_integer(header, "n", 1, limits.COUNTER_MAX),
        read_integer(header, "have", 0, limits.CONTEXT_TOKENS_MAX),
    )


def _read_cancel(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Cancel:
    return Cancel(session, epoch, hop_index, read_integer(message.header, "n", 0, limits.COUNTER_MAX))


def _read_heartbeat(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Heartbeat:
    header = message.header
    if "boot" not in header:
        return Heartbeat(session, epoch, hop_index)
    return Heartbeat(
        session,
        epoch,
        hop_index,
        read_bytes(header, "boot", limits.BOOT_ID_BYTES),
        read_integer(header, "steps", 0, limits.COUNTER_MAX),
        read_integer(header, "queue", 0, limits.COUNTER_MAX),
        read_optional_number(header, "oldest_s", 0.0, limits.DURATION_S_MAX),
    )


def _read_report(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Report:
    header = message.header
    return Report(
        session,
        epoch,
        hop_index,
        read_integer(header, "edge", 0, limits.ROUTE_HOPS_MAX),
        read_text(header, "code", limits.NAME_CHARS_MAX),
        read_text(header, "message", limits.TEXT_CHARS_MAX),
    )


def _read_leaving(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Leaving:
    deadline_s = read_number(message.header, "deadline_s", 0.0, limits.DURATION_S_MAX)
    return Leaving(session, epoch, hop_index, deadline_s)


def _read_close(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Close:
    return Close(session, epoch, hop_index)


def _read_error(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> SessionError:
    header = message.header
    turn = None if header.get("n") is None else read_integer(header, "n", 0, limits.COUNTER_MAX)
    return SessionError(
        session,
        epoch,
        hop_index,
        read_text(header, "code", limits.NAME_CHARS_MAX),
        read_text(header, "message", limits.TEXT_CHARS_MAX),
        header.get("retryable") is True,
        read_optional_number(header, "retry_after_s", 0.0, limits.DURATION_S_MAX),
        turn,
    )


def _read_reserved(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Reserved:
    return Reserved(session, epoch, hop_index, message.kind)


_READERS: dict[str, Callable[[Message, bytes, Epoch, int], SessionMessage]] = {
    "open": _read_open,
    "ready": _read_ready,
    "window": _read_window,
    "result": _read_result,
    "gap": _read_gap,
    "cancel": _read_cancel,
    "heartbeat": _read_heartbeat,
    "report": _read_report,
    "leaving": _read_leaving,
    "close": _read_close,
    "error": _read_error,
    **dict.fromkeys(RESERVED_KINDS, _read_reserved),
}
