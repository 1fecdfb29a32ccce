"""What hops answer, held against the table of docs/protocol.md, 4.1: the right word at once, and no other.

Owns, for each (host, session, hop), the place's epoch, order and end as `ready`, `close` and `error` on the wire show them, and from these
what a message has to be answered. A hop answers within the callback in which it hears, so that what it says meanwhile is its answer.
Where the answer hangs on what can't be seen from outside (a gap before it, a control stream that ended, a lease about to end), nothing
is judged. Production isn't touched. For hosts that don't die: a process that starts anew knows nothing of what is held here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from blocks.protocol.limits import HELD_S, TICK_S, TOMBSTONE_S
from netsim.copies import COPY, OTHER_DIGEST, OTHER_MODEL, TOO_FAR
from netsim.hooks import Send, hooked
from netsim.ledger import PLACES_MAX, Complain, Count
from netsim.loop import HOST
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message

RESERVED = ("route", "replay", "bridge", "fork")
SPOKEN_TO_HOPS = ("open", "window", "cancel", "heartbeat", "close", "gap", "error", *RESERVED)
ANSWERS = ("ready", "error", "gap", "report")
ENDING = ("overrun", "lease-expired", "draining")
"""Errors after which a place is empty."""
LEASE_TRUST_S = 25.0
"""So long after its driver was heard a place is surely held: leases are of 30 s."""
GRAVE_TRUST_S = TOMBSTONE_S - 5.0
UNKNOWN_BY_S = HELD_S + 4 * TICK_S
MADE_UP = (OTHER_DIGEST, OTHER_MODEL, TOO_FAR)
"""Cells of windows that are no copies of windows which somebody sent."""
SAID_BEFORE = ("hop.window-duplicate", "hop.window-late-turn")

Epoch = tuple[int, int]
Place = tuple[str, bytes, int]
Order = tuple[Mapping[str, Any], tuple[tuple[tuple[int, ...], bytes], ...]]
"""Header and prompts."""
Said = tuple[str, str]
"""Kind and code of an answer."""


@dataclass(slots=True)
class _Held:
    """What is known of one place."""

    epoch: Epoch
    control: MessageChannel
    heard_at: float
    order: Order | None = None
    """The `open` that was taken, without its epoch; None: it wasn't seen."""
    closed_at: float | None = None
    turn: int = 0
    """The highest turn heard in this epoch."""
    watermark: int = 0
    has_gap: bool = False
    reported: set[int] = field(default_factory=set)

    def has_driver(self) -> bool:
        """Whether the driver hears what the hop tells it."""
        return not self.control._ended


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Of the kinds ``among``, exactly these are to be said."""

    said: frozenset[Said]
    among: tuple[str, ...] = ("ready", "error")


NOTHING = _Wanted(frozenset())
NO_REPORT = _Wanted(frozenset(), ("report",))


class Answers:
    """See the module. ``count`` hears of ``answers`` that were judged, and of the codes among them."""

    def __init__(self, now: Callable[[], float], count: Count, complain: Complain) -> None:
        self._now = now
        self._count = count
        self._complain = complain
        self._places: dict[Place, _Held] = {}
        self._orders: dict[tuple[Place, Epoch], Order] = {}
        """Of those that wait at a channel which nobody listens to yet."""
        self._hearing: tuple[str, Message, _Wanted | None] | None = None
        self._said: list[Said] = []
        self._unknown: dict[tuple[Place, Epoch, int], list[float]] = {}
        """Windows of epochs that their hop hasn't heard of, until when each must be answered."""
        self._may_be_unknown: Counter[tuple[Place, Epoch, int]] = Counter()

    def entered(self) -> AbstractContextManager[None]:
        """Every channel of the process is looked at meanwhile."""

        def says(channel: MessageChannel, message: Message, how: Mapping[str, bool], send: Send) -> None:
            if HOST.get() and message.kind in ANSWERS and COPY not in message.header:
                self._says(channel, message)
            send(channel, message, **how)

        return hooked(says, hears=self._hears, has_heard=self._has_heard)

    def finish(self) -> None:
        """The run is over: what should have been answered by now counts."""
        now = self._now()
        for (place, epoch, turn), dues in self._unknown.items():
            if dues and dues[0] <= now:
                self._protest(place, f"held a window of turn {turn} and epoch {epoch}, and never said unknown-epoch")

    # --- what a host hears ---

    def _hears(self, channel: MessageChannel, message: Message) -> None:
        host, kind = HOST.get(), message.kind
        self._hearing = None
        self._said.clear()
        if not host or kind not in SPOKEN_TO_HOPS:
            return
        place = _place_of(host, message)
        held = self._known(place)
        if channel._receiver is not None:
            self._hearing = (host, message, self._wanted(held, message))
        elif kind == "open":  # the first word of a stream may wait until somebody listens: its answer comes later
            self._opened(place, _epoch_of(message))
            self._orders[place, _epoch_of(message)] = _order_of(message)
            if len(self._orders) > PLACES_MAX:
                del self._orders[next(iter(self._orders))]
        if kind == "window":
            self._hears_window(place, held, message)
        elif held is not None and held.closed_at is None and _epoch_of(message) == held.epoch:
            if kind == "cancel":
                held.watermark = max(held.watermark, message.header["n"])
            if kind in ("cancel", "heartbeat"):
                held.heard_at = self._now()

    def _hears_window(self, place: Place, held: _Held | None, message: Message) -> None:
        epoch, turn = _epoch_of(message), message.header["n"]
        if held is None or epoch > held.epoch:
            key = (place, epoch, turn)
            self._unknown.setdefault(key, []).append(self._now() + UNKNOWN_BY_S)
            self._may_be_unknown[key] += 1
            if len(self._unknown) > PLACES_MAX:
                del self._unknown[next(iter(self._unknown))]
        elif epoch == held.epoch and message.header.get(COPY) not in MADE_UP:
            held.turn = max(held.turn, turn)

    def _has_heard(self, channel: MessageChannel, message: Message) -> None:
        hearing, self._hearing = self._hearing, None
        if hearing is None or hearing[1] is not message:
            return
        host, _, wanted = hearing
        place, epoch = _place_of(host, message), _epoch_of(message)
        held = self._places.get(place)
        if wanted is not None:
            self._judge(place, message, wanted)
        if message.kind == "open":
            if ("ready", "") in self._said and held is not None and held.order is None:
                held.order = _order_of(message)
            elif held is not None and held.closed_at is None and epoch > held.epoch:
                held.epoch, held.closed_at = epoch, self._now()  # refused, and nothing is left of what was there
            self._opened(place, epoch)
        elif message.kind == "close" and held is not None and held.closed_at is None and epoch >= held.epoch:
            held.epoch, held.closed_at = epoch, self._now()

    def _judge(self, place: Place, message: Message, wanted: _Wanted) -> None:
        said = frozenset(one for one in self._said if one[0] in wanted.among)
        self._count("answers", 1)
        for kind, code in sorted(wanted.said):
            self._count(f"answers.{code or kind}", 1)
        if said != wanted.said:
            cell = message.header.get(COPY, message.kind)
            self._protest(place, f"{cell} was answered {_told(said)}, not {_told(wanted.said)}")

    def _opened(self, place: Place, epoch: Epoch) -> None:
        """Windows that wait for this epoch or a lower one have their `open`, or lost it."""
        for other, theirs, turn in list(self._unknown):
            if other == place and theirs <= epoch:
                del self._unknown[other, theirs, turn]

    # --- what it says ---

    def _says(self, channel: MessageChannel, message: Message) -> None:
        host, header, kind = HOST.get(), message.header, message.kind
        code = str(header.get("code", "")) if kind == "error" else ""
        self._said.append((kind, code))
        place, epoch = (host, header["s"], header["h"]), _epoch_of(message)
        held = self._places.get(place)
        if kind == "ready":
            if held is None or held.closed_at is not None or epoch != held.epoch:
                order = self._orders.pop((place, epoch), None)
                held = self._places[place] = _Held(epoch, channel, self._now(), order)
                if len(self._places) > PLACES_MAX:
                    del self._places[next(iter(self._places))]
            held.control, held.heard_at = channel, self._now()
        elif code == "unknown-epoch":
            self._says_unknown(place, epoch, header.get("n"))
        elif held is None or epoch != held.epoch or held.closed_at is not None:
            return
        elif kind == "gap":
            held.has_gap = True
        elif kind == "report":
            held.reported.add(header["edge"])
        elif code in ENDING:
            held.closed_at = self._now()

    def _says_unknown(self, place: Place, epoch: Epoch, turn: Any) -> None:
        key = (place, epoch, turn)
        self._count("answers", 1)
        self._count("answers.unknown-epoch", 1)
        if self._may_be_unknown[key] < 1:
            self._protest(place, f"said unknown-epoch of turn {turn}, which it never heard in epoch {epoch}")
            return
        self._may_be_unknown[key] -= 1
        if self._unknown.get(key):
            del self._unknown[key][0]

    # --- the table ---

    def _wanted(self, held: _Held | None, message: Message) -> _Wanted | None:
        """None: it can't be told from outside."""
        kind, epoch = message.kind, _epoch_of(message)
        if kind in RESERVED:
            return _one("error", "unsupported")
        if held is None:
            return None
        if kind == "open":
            return _to_open(held, message, epoch)
        if kind == "window":
            return _to_window(held, message, epoch)
        if kind == "error":
            return _to_error(held, message, epoch)
        return NOTHING

    def _known(self, place: Place) -> _Held | None:
        held = self._places.get(place)
        if held is None:
            return None
        since_s = self._now() - (held.heard_at if held.closed_at is None else held.closed_at)
        if since_s > (LEASE_TRUST_S if held.closed_at is None else GRAVE_TRUST_S):
            del self._places[place]
            return None
        return held

    def _protest(self, place: Place, text: str) -> None:
        host, session, _ = place
        self._complain(host, session.hex(), text)


def _to_open(held: _Held, message: Message, epoch: Epoch) -> _Wanted | None:
    if epoch < held.epoch or (epoch == held.epoch and held.closed_at is not None):
        return _one("error", "fenced" if epoch[0] < held.epoch[0] else "stale-epoch")
    if epoch > held.epoch or held.order is None:
        return None
    return _one("ready") if _order_of(message) == held.order else _one("error", "conflict")


def _to_window(held: _Held, message: Message, epoch: Epoch) -> _Wanted | None:
    header = message.header
    cell, turn = header.get(COPY), header["n"]
    if epoch < held.epoch or (held.closed_at is not None and epoch == held.epoch):
        return NOTHING
    if cell is None or epoch > held.epoch or held.has_gap or not held.has_driver():
        return None
    is_new = turn > max(held.turn, held.watermark)
    if cell == TOO_FAR and is_new:
        is_within = held.order is not None and header["o"] + header["c"] <= held.order[0]["max_tokens"]
        return _one("gap") if is_within else None
    if cell == OTHER_MODEL and is_new:
        edge = header["h"] - 1
        return _one("error", "conflict") if edge < 0 else _report_of(held, edge)
    if cell == OTHER_DIGEST and turn == held.turn:
        return _one("error", "conflict") if message.parts and turn > held.watermark else None
    return NOTHING if cell in SAID_BEFORE and turn <= held.turn else None


def _to_error(held: _Held, message: Message, epoch: Epoch) -> _Wanted | None:
    """From the hop after this one; an early copy may come from a peer that isn't, once its epoch is here."""
    if epoch != held.epoch or held.closed_at is not None:
        return NO_REPORT
    if held.order is None or not held.has_driver():
        return None
    index, route = message.header["h"], held.order[0]["route"]
    is_next = index < len(route) and bytes(route[index][0]) == message.sender
    return _report_of(held, index) if is_next else NO_REPORT


def _report_of(held: _Held, edge: int) -> _Wanted:
    """Once per edge and epoch."""
    return _Wanted(frozenset() if edge in held.reported else frozenset({("report", "")}), ("report",))


def _one(kind: str, code: str = "") -> _Wanted:
    return _Wanted(frozenset({(kind, code)}), (kind,) if kind == "gap" else ("ready", "error"))


def _told(said: frozenset[Said]) -> str:
    return " and ".join(code or kind for kind, code in sorted(said)) or "nothing"


def _order_of(message: Message) -> Order:
    """What makes two orders the same: all but the epoch, and the prompts."""
    dressing = ("e", "k", "f", "t", "p", COPY)
    header = {key: value for key, value in message.header.items() if key not in dressing}
    return header, tuple((part.shape, bytes(part.data)) for part in message.parts)


def _place_of(host: str, message: Message) -> Place:
    """Of the hop that is spoken to; gaps and errors are named after the hop that they come from."""
    header = message.header
    return host, header["s"], header["h"] - (message.kind in ("gap", "error"))


def _epoch_of(message: Message) -> Epoch:
    incarnation, counter = message.header["e"]
    return incarnation, counter
