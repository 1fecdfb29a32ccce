"""What a holder tells of a key: all of it in pages, or only what an asker hasn't been told yet. Pure.

A holder numbers what it takes and what it publishes. A cursor names the last numbers that an answer held, and which life of the holder
gave them; only that holder reads it. Nothing is remembered of askers.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Entry(NamedTuple):
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
    lacks: tuple[int, ...] = ()
    """Of what the asker knows, what isn't here, by its place."""


def page_after(
    since: Cursor, published: Sequence[Entry], stored: Sequence[Entry], known: Collection[bytes] = ()
) -> Page:
    """As much as goes into one answer of what is newer than ``since``; both in the order of their serials, the oldest first.

    Of records whose fingerprints are ``known`` to the asker it is told nothing.
    """
    own = [entry for entry in published if entry.record.fingerprint not in known]
    others = [entry for entry in stored if entry.record.fingerprint not in known]
    told = _fitting([*own, *others])
    if len(told) == len(own) + len(others):
        return _page(
            told, Cursor(since.life, _last(published, since.published), _last(stored, since.stored)), more=False
        )
    told_own, told_others = told[: len(own)], told[len(own) :]
    passed = Cursor(since.life, _last(told_own, since.published), _last(told_others, since.stored))
    return _page(told, passed, more=True)


def _last(entries: Sequence[Entry], before: int) -> int:
    return entries[-1].serial if entries else before


def lacks(known: Sequence[bytes], *held: Collection[bytes]) -> tuple[int, ...]:
    """The places of the first few of an asker's fingerprints that are in none of ``held``."""
    missing = list(enumerate(known))
    for part in held:
        missing = [entry for entry in missing if entry[1] not in part]
    return tuple([place for place, _ in missing[: limits.LACKS_TOLD_MAX]])


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
