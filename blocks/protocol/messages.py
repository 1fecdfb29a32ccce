"""Session messages as values, and how they are written as `overlay.rpc.types.Message`.

Owns the field names of `docs/protocol.md` section 3; `decoding` reads them back. Knows nothing of sessions'
states: whether a message is welcome is the business of the machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from blocks.protocol import limits
from overlay.rpc.types import Message, Part
from routing.types import Hop, ModelId

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
    """Driver to hop: take this place in this route, with empty KV.

    ``prompts`` has shape (blocks of the hop's span, length, d_model) and is added before each block at positions below length. Two
    orders are the same when all else is and their prompts' digests are (SHA-256, worked out by whoever reads the message).
    """

    KIND: ClassVar[str] = "open"

    model: ModelId
    compute_class: str
    adapter: str
    route: tuple[Hop, ...]
    driver_addresses: tuple[str, ...]
    max_tokens: int
    heartbeat_s: float
    lease_s: float
    prompts: Part | None = field(default=None, compare=False)
    prompts_digest: bytes = b""

    def to_message(self, sender: bytes, recipient: bytes) -> Message:
        parts = () if self.prompts is None else (self.prompts,)
        return Message("open", self.header(), parts, sender, recipient)

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
    Open | Ready | Window | Result | Gap | Cancel | Heartbeat | Report | Leaving | Close | SessionError | Reserved
)

RESERVED_KINDS = ("route", "replay", "bridge", "fork")


def wanted_rows(want: Want, tokens: int) -> int:
    """How many rows the result of a window of ``tokens`` carries."""
    if want == "last":
        return 1
    if want == "none":
        return 0
    return tokens if want == "all" else want[1] - want[0]
