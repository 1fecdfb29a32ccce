"""Copies on the wire: every session message of some hosts may come twice, too early or too late, or swapped with the next.

Owns a hook around `overlay.rpc.channel.MessageChannel` while it is entered, and the list of cells: for every row of docs/protocol.md,
section 4, and each of its columns, how such a copy is made from what a host really said or heard on that stream. Copies are signed by
their host and travel in sequence like everything else, so that only the machines can tell them apart. What must come of it is the
workload's to check.
"""

from __future__ import annotations

import random  # noqa: TID251 - a seeded generator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from netsim.hooks import Send, hooked
from netsim.loop import HOST, VirtualLoop
from overlay.errors import PeerdError
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message

SESSION_KINDS = frozenset(
    ("open", "ready", "window", "result", "gap", "cancel", "heartbeat", "report", "leaving", "close", "error")
)
DELAY_S_MAX = 0.4
SWAP_S_MAX = 0.5
LANES_MAX = 4096
FIRST_WINDOW = "first window"
SELDOM_KINDS = ("heartbeat", FIRST_WINDOW)
SELDOM = 10.0
"""Of what is said seldom, so many times as many are copied as of windows and results."""
FAR = 1000
"""Turns that nobody has come to."""
COPY = "copy"
"""The field that names a copy's cell; receivers ignore fields that they don't know (docs/protocol.md, 1)."""

Header = dict[str, Any]
Key = TypeVar("Key")
Value = TypeVar("Value")
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
    """Of a driver's control stream: the last turn that left the driver."""

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
        return None if said is None else _edited(said, lambda header: _with_epoch(header, by))

    return make


def _far(kind: str) -> Edit:
    """A turn that was never sent, one token beyond the next place: within the session's length, or that would be what is refused."""
    return _newest(kind, lambda header: {**header, "n": header["n"] + FAR, "o": header["o"] + header["c"] + 1})


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
        return _edited(said, edit)

    return make


def _own(kind: str, fields: Callable[[Lane], Header], epoch: int = 0) -> Edit:
    return lambda lane: lane.message(kind, fields(lane), epoch=epoch)


def _with_epoch(header: Header, by: int) -> Header:
    incarnation, counter = header["e"]
    return {**header, "e": [incarnation, counter + by]}


def _edited(message: Message, edit: Callable[[Header], Header]) -> Message:
    """To be signed anew."""
    header = edit({key: value for key, value in message.header.items() if key not in ("k", "f", "t", "p")})
    return replace(message, header=header, header_bytes=None, signature=None, sender=b"", recipient=b"")


def _turn(lane: Lane) -> int:
    """The last turn that was said or heard on this lane."""
    return max(
        (int(message.header["n"]) for message in lane.said.values() if message.header.get("n") is not None), default=1
    )


def _gap(lane: Lane) -> Header:
    return {"b": 0, "n": _turn(lane), "have": 0}


def _far_gap(lane: Lane) -> Header:
    return {"b": 0, "n": _turn(lane) + FAR, "have": 0}


def _error(code: str) -> Callable[[Lane], Header]:
    return lambda lane: {
        "code": code, "message": "mischief", "retryable": True, "retry_after_s": None, "n": None
    }  # fmt: skip


def _report(lane: Lane) -> Header:
    return {"edge": lane.header["h"] + 1, "code": "connection-lost", "message": "mischief"}


def _cancel(lane: Lane) -> Header:
    """Of the turn that has just left the driver: some hops have computed it by then, others haven't."""
    return {"n": lane.turn}


def _far_cancel(lane: Lane) -> Header:
    """It would empty all that comes."""
    return {"n": lane.turn + FAR}


def _cancels() -> list[Cell]:
    def aside(column: str, fields: Callable[[Lane], Header], epoch: int = 0) -> Cell:
        return Cell("hop", "cancel", column, FORWARD, "window", _own("cancel", fields, epoch), column == "first", True)

    return [
        aside("first", _cancel),
        Cell("hop", "cancel", "duplicate", DRIVER_CONTROL, "cancel", _again("cancel")),
        aside("early", _far_cancel, 1),
        aside("late", _far_cancel, -1),
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
    *_copies("hop", "window", FORWARD),
    Cell("hop", "window", "early-place", FORWARD, "window", _far("window"), at_once=True),
    Cell("hop", "window", "early-next", FORWARD, "window", _next("window", 1), at_once=True),
    Cell("hop", "window", "late-next", FORWARD, "window", _next("window", -1), at_once=True),
    Cell("hop", "window", "late-turn", FORWARD, "window", _older("window")),
    Cell("hop", "window", "late-epoch", FORWARD, FIRST_WINDOW, lambda lane: lane.former, at_once=True),
    *_cancels(),
    *_copies("hop", "heartbeat", DRIVER_CONTROL),
    *_copies("hop", "close", DRIVER_CONTROL, at_once=True),
    *_three("hop", "gap", BACKWARD, "window", _gap),
    *_three("hop", "error", BACKWARD, "window", _error("conflict")),
    *_three("hop", "fork", DRIVER_CONTROL, "heartbeat", _nothing),
    *_copies("driver", "ready", HOP_CONTROL),
    *_copies("driver", "result", RESULTS),
    Cell("driver", "result", "early-turn", RESULTS, "result", _far("result")),
    Cell("driver", "result", "late-turn", RESULTS, "result", _older("result")),
    *_three("driver", "gap", HOP_CONTROL, "heartbeat", _gap),
    Cell("driver", "gap", "early-turn", HOP_CONTROL, "heartbeat", _own("gap", _far_gap)),
    *_copies("driver", "heartbeat", HOP_CONTROL),
    *_three("driver", "report", HOP_CONTROL, "heartbeat", _report),
    *_three("driver", "leaving", HOP_CONTROL, "heartbeat", _leaving),
    *_three("driver", "error", HOP_CONTROL, "heartbeat", _error("overrun")),
    Cell("driver", "error", "unsupported", HOP_CONTROL, "heartbeat", _own("error", _error("unsupported"))),
)


# --- the hook ---


class Mischief:
    """See the module. ``rate`` is the share of messages that are followed by a copy, ``swaps`` of windows that go after the next one."""

    def __init__(
        self, loop: VirtualLoop, draws: random.Random, rate: float, swaps: float, count: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._draws = draws
        self._rate = rate
        self._swaps = swaps
        self._count = count
        self._made = {cell.name: 0 for cell in CELLS}
        self._lanes: dict[MessageChannel, Lane] = {}
        self._controls: dict[tuple[str, bytes], dict[int, Lane]] = {}
        """The latest control streams of a driver's session, by hop."""
        self._firsts: dict[tuple[str, bytes, int], Message] = {}
        """The first window of the latest forward stream from a host to a place."""
        self._send = MessageChannel.send
        self.quiet = False
        """No copies for now."""

    def entered(self) -> AbstractContextManager[None]:
        """Every message channel of the process is hooked meanwhile; those without a host are left alone."""
        return hooked(self._says, has_heard=self.heard)

    def _says(self, channel: MessageChannel, message: Message, how: Mapping[str, bool], _: Send) -> None:
        self.sent(channel, message, how)

    def sent(self, channel: MessageChannel, message: Message, how: Mapping[str, bool]) -> None:
        """A host says something: let it, and perhaps say something more."""
        lane = None
        if HOST.get() and message.kind in SESSION_KINDS and not any(how.values()):
            lane = self._lane(channel, message)
        if lane is None:
            self._send(channel, message, **how)
            return
        if lane.swapped is None and lane.said and message.kind == "window" and self._draws.random() < self._swaps:
            lane.swapped = message
            self._loop.call_later(self._draws.uniform(0, SWAP_S_MAX), self._unswap, lane, True)
            return
        if lane.role == FORWARD and not lane.said:
            self._begin(lane, message)
        self._note(lane, message)
        self._send(channel, message)
        self._unswap(lane)
        self._perhaps(lane, message.kind)

    def heard(self, channel: MessageChannel, message: Message) -> None:
        """What comes by a forward stream tells its receiver whom it could answer backwards."""
        if message.kind != "window" or not HOST.get():
            return
        lane = self._lanes.get(channel)
        if lane is None:
            lane = self._new(channel, BACKWARD, message)
        self._note(lane, message)
        self._perhaps(lane, "window")

    def _lane(self, channel: MessageChannel, message: Message) -> Lane | None:
        lane = self._lanes.get(channel)
        if lane is None:
            role = ROLES.get(message.kind)
            return None if role is None else self._new(channel, role, message)
        return lane

    def _new(self, channel: MessageChannel, role: str, message: Message) -> Lane:
        header = {key: message.header[key] for key in ("s", "e", "h")}
        lane = self._lanes[channel] = Lane(HOST.get(), role, channel, header)
        if len(self._lanes) > LANES_MAX:
            del self._lanes[next(iter(self._lanes))]
        return lane

    def _note(self, lane: Lane, message: Message) -> None:
        if message.kind in lane.said:
            lane.before[message.kind] = lane.said[message.kind]
        lane.said[message.kind] = message
        if message.kind in ("window", "result"):
            lane.top = max(lane.top, message.header["n"])
        lane.header = {key: message.header[key] for key in ("s", "e", "h")}

        if lane.role == DRIVER_CONTROL:
            _kept(self._controls, (lane.host, lane.header["s"]), {})[lane.header["h"]] = lane
        elif lane.role == FORWARD and message.kind == "window":
            for control in self._controls.get((lane.host, lane.header["s"]), {}).values():
                control.turn = message.header["n"]

    def _begin(self, lane: Lane, window: Message) -> None:
        """The first window of a forward stream: one of the epoch before may arrive just before it."""
        place = (lane.host, lane.header["s"], lane.header["h"])
        former = self._firsts.get(place)
        if former is not None and former.header["e"] != window.header["e"]:
            lane.former = _edited(former, lambda header: header)
            self._perhaps(lane, FIRST_WINDOW)
        _kept(self._firsts, place, window)
        self._firsts[place] = window

    def _unswap(self, lane: Lane, quietly: bool = False) -> None:
        held, lane.swapped = lane.swapped, None
        if held is None:
            return
        self._note(lane, held)
        try:
            self._send(lane.channel, held)
        except PeerdError:
            if not quietly:
                raise

    def _perhaps(self, lane: Lane, trigger: str) -> None:
        often = SELDOM if trigger in SELDOM_KINDS else 1.0
        if self.quiet or self._draws.random() >= self._rate * often:
            return
        usable = [cell for cell in CELLS if cell.role == lane.role and cell.trigger == trigger]
        asides = self._asides(lane) if trigger == "window" else []
        made = [
            (self._made[cell.name], index, cell) for index, cell in enumerate(usable) if asides or not cell.is_aside
        ]
        if not made:
            return
        _, _, cell = min(made)
        if cell.is_aside:
            lane = asides[self._draws.randrange(len(asides))]
        copy = cell.make(lane)
        if copy is None:
            return
        self._made[cell.name] += 1
        delay_s = 0.0 if cell.at_once else self._draws.choice((0.0, self._draws.uniform(0, DELAY_S_MAX)))
        if delay_s:
            self._loop.call_later(delay_s, self._say, lane, cell, copy)
        else:
            self._say(lane, cell, copy)

    def _asides(self, lane: Lane) -> list[Lane]:
        """The control streams of the driver whose window has just gone out by ``lane``; none where it was a hop's."""
        if lane.role != FORWARD:
            return []
        controls = self._controls.get((lane.host, lane.header["s"]), {}).values()
        return [control for control in controls if control.header["e"] == lane.header["e"]]

    def _say(self, lane: Lane, cell: Cell, copy: Message) -> None:
        try:
            self._send(lane.channel, _marked(copy, cell))
        except PeerdError:
            return  # the stream ended meanwhile
        self._count(cell.name)
        if cell.column == "first":  # the duplicate of what we made up is a copy too
            duplicates = [
                one for one in CELLS if one.side == cell.side and one.kind == cell.kind and one.column == "duplicate"
            ]
            for duplicate in duplicates:
                try:
                    self._send(lane.channel, _marked(copy, duplicate))
                except PeerdError:
                    return
                self._count(duplicate.name)


def _marked(copy: Message, cell: Cell) -> Message:
    return _edited(copy, lambda header: {**header, COPY: cell.name})


def _kept(table: dict[Key, Value], key: Key, default: Value) -> Value:
    """What the table has under ``key``, ``default`` from now on where that's nothing; the oldest goes when there are too many."""
    found = table.setdefault(key, default)
    if len(table) > LANES_MAX:
        del table[next(iter(table))]
    return found
