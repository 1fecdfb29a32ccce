"""Copies on the wire: every session message of some hosts may come twice, too early or too late, or swapped with the next.

Owns a hook around `overlay.rpc.channel.MessageChannel` while it is entered, and the draws of which copy (`netsim.copies`) is made when.
Copies are signed by their host and travel in sequence like everything else, so that only the machines can tell them apart. What must come
of it is the workload's to check.
"""

from __future__ import annotations

import random  # noqa: TID251 - a seeded generator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from netsim.copies import (
    BACKWARD,
    CELLS,
    COPY,
    DRIVER_CONTROL,
    FAR,
    FIRST_WINDOW,
    FORWARD,
    HOP_CONTROL,
    ROLES,
    Cell,
    Lane,
    edited,
)
from netsim.hooks import Send, hooked
from netsim.loop import HOST, VirtualLoop
from overlay.errors import PeerdError
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message

__all__ = ["CELLS", "COPY", "FAR", "Mischief"]

SESSION_KINDS = frozenset(
    ("open", "ready", "window", "result", "gap", "cancel", "heartbeat", "report", "leaving", "close", "error")
)
DELAY_S_MAX = 0.4
SWAP_S_MAX = 0.5
LANES_MAX = 4096
OFTEN = {"heartbeat": 10.0, FIRST_WINDOW: 3.0, "open": 2.0}
"""Of what is said seldom, so many times as many are copied as of windows and results."""
OWED = 4.0
"""And so many times as many where a cell has never come yet: the seed draws when one comes, not whether."""

Key = TypeVar("Key")
Value = TypeVar("Value")


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
        self._hops: dict[tuple[str, bytes, int], Lane] = {}
        """The latest control stream of a hop."""
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

        if lane.role == HOP_CONTROL:
            place = (lane.host, lane.header["s"], lane.header["h"])
            _kept(self._hops, place, lane)
            self._hops[place] = lane
        elif lane.role == BACKWARD:
            hop = self._hops.get((lane.host, lane.header["s"], lane.header["h"]))
            if hop is not None:
                hop.turn = message.header["n"]
        elif lane.role == DRIVER_CONTROL:
            _kept(self._controls, (lane.host, lane.header["s"]), {})[lane.header["h"]] = lane
        elif lane.role == FORWARD and message.kind == "window":
            for control in self._controls.get((lane.host, lane.header["s"]), {}).values():
                control.turn = message.header["n"]

    def _begin(self, lane: Lane, window: Message) -> None:
        """The first window of a forward stream: one of the epoch before may arrive just before it."""
        place = (lane.host, lane.header["s"], lane.header["h"])
        former = self._firsts.get(place)
        if former is not None and former.header["e"] != window.header["e"]:
            lane.former = edited(former, lambda header: header)
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
        if self.quiet:
            return
        usable = [cell for cell in CELLS if cell.role == lane.role and cell.trigger == trigger]
        asides = self._asides(lane) if trigger == "window" else []
        made = [
            (self._made[cell.name] / cell.share, index, cell)
            for index, cell in enumerate(usable)
            if asides or not cell.is_aside
        ]
        if not made:
            return
        times, _, cell = min(made)
        often = OFTEN.get(trigger, 1.0) * (1.0 if times else OWED)
        if self._draws.random() >= self._rate * often:
            return
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
            self._made[cell.name] -= 1  # the stream ended meanwhile: it is to come another time
            return
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
    return edited(copy, lambda header: {**header, COPY: cell.name})


def _kept(table: dict[Key, Value], key: Key, default: Value) -> Value:
    """What the table has under ``key``, ``default`` from now on where that's nothing; the oldest goes when there are too many."""
    found = table.setdefault(key, default)
    if len(table) > LANES_MAX:
        del table[next(iter(table))]
    return found
