"""What a holder tells of a key: all of it in pages, or only what an asker hasn't been told yet. Pure.

A holder numbers what it takes and what it publishes. A cursor names the last numbers that an answer held, and which life of the holder
gave them; only that holder reads it. Nothing is remembered of askers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from overlay.dht import limits
from overlay.dht.records import Record

_CURSOR = struct.Struct(f">{limits.LIFE_BYTES}sQQ")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far an asker has read.

    Attributes:
        life: drawn at the holder's start: the numbers of another life mean nothing.
        published: the serial of the last publication that was told.
        stored: that of the last record held for others.
    """

    life: bytes
    published: int = 0
    stored: int = 0

    def encode(self) -> bytes:
        """At most `limits.CURSOR_BYTES_MAX` bytes."""
        return _CURSOR.pack(self.life, self.published, self.stored)


def read_cursor(data: bytes, life: bytes) -> Cursor:
    """The cursor that an asker brings; the beginning for one of another life, and for anything else."""
    if len(data) == _CURSOR.size:
        found = Cursor(*_CURSOR.unpack(data))
        if found.life == life:
            return found
    return Cursor(life)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that can be told, its serial, and the seconds that it has left to live."""

    record: Record
    serial: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Page:
    """Part of what a holder has under a key; ``more`` where there is some behind ``cursor``."""

    records: tuple[Record, ...]
    left_s: tuple[int, ...]
    cursor: Cursor
    more: bool


def page_after(since: Cursor, published: Sequence[Entry], stored: Sequence[Entry]) -> Page:
    """As much as goes into one answer of what is newer than ``since``; both in the order of their serials, the oldest first."""
    told = _fitting([*published, *stored])
    own, others = told[: len(published)], told[len(published) :]
    cursor = Cursor(
        since.life,
        own[-1].serial if own else since.published,
        others[-1].serial if others else since.stored,
    )
    return _page(told, cursor, more=len(told) < len(published) + len(stored))


def last_page(since: Cursor, published: Sequence[Entry], stored: Sequence[Entry]) -> Page:
    """For one who knows no pages: the newest, since withdrawals and newcomers are among them."""
    return _page(_fitting([*reversed(published), *reversed(stored)]), since, more=False)


def _fitting(entries: Sequence[Entry]) -> Sequence[Entry]:
    """So many of the first, and at least one."""
    size_bytes = 0
    for count, entry in enumerate(entries):
        size_bytes += entry.record.size_bytes
        if count and (size_bytes > limits.PAGE_BYTES or count >= limits.PAGE_RECORDS):
            return entries[:count]
    return entries


def _page(told: Sequence[Entry], cursor: Cursor, *, more: bool) -> Page:
    # Rounded up: a record that has half a second left isn't over.
    left_s = tuple(max(1, min(entry.record.ttl_s, -int(-entry.left_s // 1))) for entry in told)
    return Page(tuple(entry.record for entry in told), left_s, cursor, more)
