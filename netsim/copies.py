"""The cells of docs/protocol.md's tables of copies: for every row of section 4 and each of its columns, how such a copy is made. Pure.

Owns what is known of a stream (a lane), and how a copy is made from what a host really said or heard on it. When one is made, and that it
goes out, is `netsim.mischief`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part

FIRST_WINDOW = "first window"
"""What the first window of a forward stream triggers."""
OTHER_DIGEST, OTHER_MODEL, TOO_FAR = "hop.window-other-digest", "hop.window-other-model", "hop.window-early-place"
FAR = 1000
"""Turns that nobody has come to."""
COPY = "copy"
"""The field that names a copy's cell; receivers ignore fields that they don't know (docs/protocol.md, 1)."""

Header = dict[str, Any]
Edit = Callable[["Lane"], Message | None]


@dataclass(slots=True)
class Lane:
    """One stream as one of its two ends uses it: what that end said on it last, of each kind, and for which session."""

    host: str
    role: str
    channel: MessageChannel
    header: Header
    """Session, epoch and hop index of whom this end is or speaks to."""
    said: dict[str, Message] = field(default_factory=dict)
    before: dict[str, Message] = field(default_factory=dict)
    """The one before the last."""
    swapped: Message | None = None
    """A window that waits for the next one to go first."""
    top: int = 0
    """The highest turn that was said or heard on it."""
    former: Message | None = None
    """Of a forward stream: the first window that its host said to this place on the stream before, in another epoch."""
    turn: int = 1
    """Of a control stream: the last turn that left its driver, or that its hop heard."""

    def message(self, kind: str, fields: Mapping[str, Any] | None = None, *, epoch: int = 0) -> Message:
        """A message of our own making about this lane's session, ``epoch`` counters away."""
        incarnation, counter = self.header["e"]
        header = {**self.header, "e": [incarnation, counter + epoch], **(fields or {})}
        return Message(kind, header)


@dataclass(frozen=True, slots=True)
class Cell:
    """One copy: the receiver's side, the message, the column; ``trigger`` is the kind after which it can be made on lanes of ``role``."""

    side: str
    kind: str
    column: str
    role: str
    trigger: str
    make: Edit
    at_once: bool = False
    """The stream may be closed right afterwards."""
    is_aside: bool = False
    """Said on one of the driver's control streams, whatever stream the trigger was on."""
    share: int = 1
    """So many times as often as others of its trigger."""

    @property
    def name(self) -> str:
        return f"{self.side}.{self.kind}-{self.column}"


# --- how copies are made ---


def _again(kind: str) -> Edit:
    return lambda lane: lane.said.get(kind)


def _older(kind: str) -> Edit:
    return lambda lane: lane.before.get(kind)


def _other_epoch(kind: str, by: int) -> Edit:
    def make(lane: Lane) -> Message | None:
        said = lane.said.get(kind)
        return None if said is None else edited(said, lambda header: _with_epoch(header, by))

    return make


def _far(kind: str) -> Edit:
    """A turn that was never sent, one token beyond the next place: within the session's length, or that would be what is refused."""
    return _newest(kind, lambda header: {**header, "n": header["n"] + FAR, "o": header["o"] + header["c"] + 1})


def _far_window(lane: Lane) -> Message | None:
    """Of one token, or a copy of a long one would go beyond the session's length."""
    copy = _far("window")(lane)
    if copy is None or not copy.parts:
        return None
    part = copy.parts[0]
    row = Part(part.name, part.dtype, (1, part.shape[1]), bytes(part.data)[: part.size_bytes // part.shape[0]])
    return replace(copy, header={**copy.header, "c": 1}, parts=(row,), parts_digest=None)


def _next(kind: str, epoch: int) -> Edit:
    """What would fit in the next place, were its epoch the hop's."""

    def edit(header: Header) -> Header:
        return _with_epoch({**header, "n": header["n"] + 1, "o": header["o"] + header["c"]}, epoch)

    return _newest(kind, edit)


def _newest(kind: str, edit: Callable[[Header], Header]) -> Edit:
    def make(lane: Lane) -> Message | None:
        said = lane.said.get(kind)
        if said is None or isinstance(said.header["w"], list | tuple) or said.header["n"] < lane.top:
            return None  # said again out of a journal: the receiver is further than this
        return edited(said, edit)

    return make


def _other_route(header: Header) -> Header:
    """Another peer serves one of the other hops; of a route of one hop, the address of that one is another."""
    route, index = [list(hop) for hop in header["route"]], header["h"]
    if len(route) > 1:
        other = route[index - 1]
        other[0] = other[0][:-1] + bytes((other[0][-1] ^ 1,))
    else:
        route[0][1] = [*route[0][1][1:], "/ip4/192.0.2.1/tcp/1"]
    return {**header, "route": route}


def _other_prompts(lane: Lane) -> Message | None:
    said = lane.said.get("open")
    if said is None:
        return None
    _, _, start, end = said.header["route"][said.header["h"]]
    prompts = Part("prompts", "float32", (end - start, 1, 1), bytes(4 * (end - start)))
    return replace(edited(said, dict), parts=(prompts,), parts_digest=None)


def _lower_incarnation(header: Header) -> Header:
    incarnation, counter = header["e"]
    return {**header, "e": [incarnation - 1, counter]}


def _edit(kind: str, edit: Callable[[Header], Header]) -> Edit:
    def make(lane: Lane) -> Message | None:
        said = lane.said.get(kind)
        return None if said is None else edited(said, edit)

    return make


def _other_digest(lane: Lane) -> Message | None:
    """The newest window with other numbers in it."""
    said = lane.said.get("window")
    if said is None or not said.parts or said.header["n"] < lane.top:
        return None
    part = said.parts[0]
    data = bytes(byte ^ 1 for byte in bytes(part.data))
    return replace(edited(said, dict), parts=(Part(part.name, part.dtype, part.shape, data),), parts_digest=None)


def _other_model(header: Header) -> Header:
    return {**header, "n": header["n"] + 1, "o": header["o"] + header["c"], "m": bytes(len(header["m"]))}


def _other_boot(header: Header) -> Header:
    return {**header, "boot": bytes(len(header["boot"]))}


def _own(kind: str, fields: Callable[[Lane], Header], epoch: int = 0) -> Edit:
    return lambda lane: lane.message(kind, fields(lane), epoch=epoch)


def _with_epoch(header: Header, by: int) -> Header:
    incarnation, counter = header["e"]
    return {**header, "e": [incarnation, counter + by]}


def edited(message: Message, edit: Callable[[Header], Header]) -> Message:
    """To be signed anew."""
    header = edit({key: value for key, value in message.header.items() if key not in ("k", "f", "t", "p")})
    return replace(message, header=header, header_bytes=None, signature=None, sender=b"", recipient=b"")


def _turn(lane: Lane) -> int:
    """The last turn that was said or heard on this lane."""
    said = (int(message.header["n"]) for message in lane.said.values() if message.header.get("n") is not None)
    return max((lane.turn, *said))


def _gap(lane: Lane) -> Header:
    return {"b": 0, "n": _turn(lane), "have": 0}


def _far_gap(lane: Lane) -> Header:
    return {"b": 0, "n": _turn(lane) + FAR, "have": 0}


def _answered_gap(lane: Lane) -> Message | None:
    """Of the first turn, once there is another."""
    return None if _turn(lane) < 2 else lane.message("gap", {"b": 0, "n": 1, "have": 0})


def _error(code: str) -> Callable[[Lane], Header]:
    return lambda lane: {
        "code": code, "message": "mischief", "retryable": True, "retry_after_s": None, "n": None
    }  # fmt: skip


def _report(lane: Lane) -> Header:
    return {"edge": lane.header["h"] + 1, "code": "connection-lost", "message": "mischief"}


def _report_without_edge(lane: Lane) -> Header:
    return {**_report(lane), "edge": lane.header["h"] + 9}


def _cancel(lane: Lane) -> Header:
    """Of the turn that has just left the driver: some hops have computed it by then, others haven't."""
    return {"n": lane.turn}


def _far_cancel(lane: Lane) -> Header:
    """It would empty all that comes."""
    return {"n": lane.turn + FAR}


def _aside(kind: str, column: str, fields: Callable[[Lane], Header], epoch: int = 0) -> Cell:
    """Said by a driver whose window has just left. Of cancels few come in time to empty anything."""
    is_first = column == "first"
    share = 3 if is_first and kind == "cancel" else 1
    return Cell("hop", kind, column, FORWARD, "window", _own(kind, fields, epoch), is_first, True, share)


def _asides(kind: str, fields: Callable[[Lane], Header], far: Callable[[Lane], Header]) -> list[Cell]:
    """As `_three`, for what drivers have seldom a reason to say, or none."""
    return [
        _aside(kind, "first", fields),
        Cell("hop", kind, "duplicate", DRIVER_CONTROL, kind, _again(kind)),
        _aside(kind, "early", far, 1),
        _aside(kind, "late", far, -1),
    ]


def _nothing(lane: Lane) -> Header:
    return {}


def _leaving(lane: Lane) -> Header:
    return {"deadline_s": 5.0}


DRIVER_CONTROL, FORWARD, HOP_CONTROL, RESULTS, BACKWARD = "driver-control", "forward", "hop-control", "results", "back"
ROLES = {"open": DRIVER_CONTROL, "window": FORWARD, "ready": HOP_CONTROL, "result": RESULTS}
"""Which kind, when an end says it first on a stream, tells what the stream is to that end."""


def _three(side: str, kind: str, role: str, trigger: str, fields: Callable[[Lane], Header]) -> list[Cell]:
    """First, early and late copies of a message that its sender had no reason for; the duplicate is of the first."""
    return [
        Cell(side, kind, "first", role, trigger, _own(kind, fields)),
        Cell(side, kind, "duplicate", role, kind, _again(kind)),
        Cell(side, kind, "early", role, trigger, _own(kind, fields, 1)),
        Cell(side, kind, "late", role, trigger, _own(kind, fields, -1)),
    ]


def _copies(side: str, kind: str, role: str, *, at_once: bool = False) -> list[Cell]:
    """Duplicate, early and late copies of a message that its sender has just said."""
    return [
        Cell(side, kind, "duplicate", role, kind, _again(kind), at_once),
        Cell(side, kind, "early", role, kind, _other_epoch(kind, 1), at_once),
        Cell(side, kind, "late", role, kind, _other_epoch(kind, -1), at_once),
    ]


CELLS: tuple[Cell, ...] = (
    *_copies("hop", "open", DRIVER_CONTROL),
    Cell("hop", "open", "other-route", DRIVER_CONTROL, "open", _edit("open", _other_route)),
    Cell("hop", "open", "other-prompts", DRIVER_CONTROL, "open", _other_prompts),
    Cell("hop", "open", "fenced", DRIVER_CONTROL, "open", _edit("open", _lower_incarnation)),
    Cell("hop", "open", "closed", DRIVER_CONTROL, "close", _again("open"), at_once=True),
    *_copies("hop", "window", FORWARD),
    Cell("hop", "window", "early-place", FORWARD, "window", _far_window, at_once=True),
    Cell("hop", "window", "early-next", FORWARD, "window", _next("window", 1), at_once=True),
    Cell("hop", "window", "late-next", FORWARD, "window", _next("window", -1), at_once=True),
    Cell("hop", "window", "late-turn", FORWARD, "window", _older("window")),
    Cell("hop", "window", "late-epoch", FORWARD, FIRST_WINDOW, lambda lane: lane.former, at_once=True),
    Cell("hop", "window", "other-digest", FORWARD, "window", _other_digest, at_once=True),
    Cell("hop", "window", "other-model", FORWARD, "window", _newest("window", _other_model), at_once=True),
    *_asides("cancel", _cancel, _far_cancel),
    Cell("hop", "heartbeat", "duplicate", DRIVER_CONTROL, "heartbeat", _again("heartbeat")),
    _aside("heartbeat", "early", _nothing, 1),
    _aside("heartbeat", "late", _nothing, -1),
    *_copies("hop", "close", DRIVER_CONTROL, at_once=True),
    *_three("hop", "gap", BACKWARD, "window", _gap),
    *_three("hop", "error", BACKWARD, "window", _error("conflict")),
    *_asides("fork", _nothing, _nothing),
    *_copies("driver", "ready", HOP_CONTROL),
    Cell("driver", "ready", "other-boot", HOP_CONTROL, "ready", _edit("ready", _other_boot)),
    *_copies("driver", "result", RESULTS),
    Cell("driver", "result", "early-turn", RESULTS, "result", _far("result")),
    Cell("driver", "result", "late-turn", RESULTS, "result", _older("result")),
    *_three("driver", "gap", HOP_CONTROL, "heartbeat", _gap),
    Cell("driver", "gap", "early-turn", HOP_CONTROL, "heartbeat", _own("gap", _far_gap)),
    Cell("driver", "gap", "late-turn", HOP_CONTROL, "heartbeat", _answered_gap),
    *_copies("driver", "heartbeat", HOP_CONTROL),
    Cell("driver", "heartbeat", "other-boot", HOP_CONTROL, "heartbeat", _edit("heartbeat", _other_boot)),
    *_three("driver", "report", HOP_CONTROL, "heartbeat", _report),
    Cell("driver", "report", "no-edge", HOP_CONTROL, "heartbeat", _own("report", _report_without_edge)),
    *_three("driver", "leaving", HOP_CONTROL, "heartbeat", _leaving),
    *_three("driver", "error", HOP_CONTROL, "heartbeat", _error("overrun")),
    Cell("driver", "error", "unsupported", HOP_CONTROL, "heartbeat", _own("error", _error("unsupported"))),
)
