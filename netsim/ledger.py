"""What hops do, held against what they were asked: messages on the wire and jobs on devices, seen from outside.

Owns, for each (host, session, hop), which windows it heard and which it said and computed, and so whether anything that it did has no
message behind it (docs/protocol.md, 4.1): a window of another epoch that counted, a duplicate computed twice, a window emptied without a
cancel. Counts what came out of journals, too. Production isn't touched: `MessageChannel` and the simulated device are looked at while the
ledger is entered. Hops that are their own neighbours say nothing on the wire, and are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from blocks.protocol.device import Job, ReleaseJob, SpanJob
from netsim.hooks import Send, hooked
from netsim.loop import HOST
from netsim.mischief import COPY
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message

PLACES_MAX = 4096
EARLY = ("hop.window-early", "hop.window-early-next")
"""The copies that may count, once their epoch is opened."""

Count = Callable[[str, int], None]
Complain = Callable[[str, str, str], None]
"""(host, session, what it did)"""

Place = tuple[str, bytes, int]
Epoch = tuple[int, int]


@dataclass(slots=True)
class _Seen:
    """One hop of one session. Windows are by (epoch, turn), or by (position, tokens) where a device has no turns."""

    heard: Counter[tuple[Epoch, int]] = field(default_factory=Counter)
    empty: dict[tuple[Epoch, int], bool] = field(default_factory=dict)
    said: Counter[tuple[Epoch, int]] = field(default_factory=Counter)
    gaps: Counter[Epoch] = field(default_factory=Counter)
    watermark: dict[Epoch, int] = field(default_factory=dict)
    epoch: Epoch = (-1, -1)
    turns: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """Of the latest epoch, without copies."""
    early: Counter[tuple[Epoch, int, int]] = field(default_factory=Counter)
    ran: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Since the KV was last dropped."""
    has_gap: bool = False
    """The next hop lacks something, and had nothing said again yet."""


class Ledger:
    """See the module. ``count`` hears of ``gaps``, ``journal.answers``, ``journal.repairs`` and ``emptied``."""

    def __init__(self, count: Count, complain: Complain) -> None:
        self._count = count
        self._complain = complain
        self._places: dict[Place, _Seen] = {}

    def entered(self) -> AbstractContextManager[None]:
        """Every channel and every device of the process is looked at meanwhile."""

        def says(channel: MessageChannel, message: Message, how: Mapping[str, bool], send: Send) -> None:
            self._says(message)
            send(channel, message, **how)

        return hooked(says, hears=self._hears, computes=self._computes)

    # --- what a host hears ---

    def _hears(self, _: MessageChannel, message: Message) -> None:
        host, header, kind = HOST.get(), message.header, message.kind
        if not host or kind not in ("window", "gap", "cancel"):
            return
        epoch = _epoch_of(header)
        if kind == "window":
            self._hears_window(self._seen((host, header["s"], header["h"])), message, epoch)
            return
        if kind == "cancel":  # it may come before the first window
            watermark = self._seen((host, header["s"], header["h"])).watermark
            watermark[epoch] = max(watermark.get(epoch, 0), header["n"])
            return
        seen = self._places.get((host, header["s"], header["h"] - 1))
        if seen is None:
            return
        seen.gaps[epoch] += 1
        if COPY not in header:
            self._count("gaps", 1)
            seen.has_gap = True

    def _hears_window(self, seen: _Seen, message: Message, epoch: Epoch) -> None:
        header = message.header
        turn, where = header["n"], (header["o"], header["c"])
        seen.heard[epoch, turn] += 1
        seen.empty[epoch, turn] = seen.empty.get((epoch, turn), False) or not message.parts
        copy = header.get(COPY)
        if copy is None:
            if epoch > seen.epoch:
                seen.epoch = epoch
                seen.turns.clear()
            if epoch == seen.epoch:
                seen.turns.setdefault(where, set()).add(turn)
        elif copy in EARLY:
            seen.early[epoch, *where] += 1

    # --- what it says and computes ---

    def _says(self, message: Message) -> None:
        host, header, kind = HOST.get(), message.header, message.kind
        if not host or kind not in ("window", "result") or COPY in header:
            return
        seen = self._places.get((host, header["s"], header["h"] - (kind == "window")))
        if seen is None or not seen.heard:
            return
        epoch, turn = _epoch_of(header), header["n"]
        seen.said[epoch, turn] += 1
        times, heard = seen.said[epoch, turn], seen.heard[epoch, turn]
        if times > 1:
            self._count("journal.answers", 1)
            if seen.has_gap:
                seen.has_gap = False
                self._count("journal.repairs", 1)
        if times > heard + seen.gaps[epoch]:
            self._protest(message, f"said turn {turn} for the {times}. time, and heard it {heard} times in that epoch")
        if header.get("x") is True and not seen.empty.get((epoch, turn), False):
            self._count("emptied", 1)
            if seen.watermark.get(epoch, 0) < turn:
                self._protest(message, f"emptied turn {turn}, which nobody had cancelled")

    def _computes(self, job: Job) -> None:
        host = HOST.get()
        if not isinstance(job, SpanJob | ReleaseJob):
            return
        seen = self._places.get((host, job.lease.session, job.lease.hop_index))
        if seen is None or seen.epoch == (-1, -1):
            return
        if isinstance(job, ReleaseJob):
            seen.ran.clear()
            return
        where = (job.position, job.tokens)
        seen.ran[where] += 1
        asked = len(seen.turns.get(where, ())) + seen.early[seen.epoch, *where]
        if seen.ran[where] > asked:
            text = f"computed position {job.position} for the {seen.ran[where]}. time, and was asked {asked} times"
            self._complain(host, job.lease.session.hex(), text)

    def _protest(self, message: Message, text: str) -> None:
        self._complain(HOST.get(), message.header["s"].hex(), text)

    def _seen(self, place: Place) -> _Seen:
        seen = self._places.get(place)
        if seen is None:
            seen = self._places[place] = _Seen()
            if len(self._places) > PLACES_MAX:
                del self._places[next(iter(self._places))]
        return seen


def _epoch_of(header: Any) -> Epoch:
    incarnation, counter = header["e"]
    return incarnation, counter
