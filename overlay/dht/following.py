"""A key that is read again and again: a few of its holders are asked, each only for what it hasn't told yet.

`Known` (pure) keeps what holders told and lets it expire by itself; `FollowedKey` asks. Which holders is drawn by each reader for
itself, and one of them is replaced from time to time: no few nodes answer everybody, and none can hide a record for long.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.lookup import Found, later_after, patience_of
from overlay.dht.records import Record, RecordName, location_of, merge
from overlay.dht.table import Contact


class Asker(Protocol):
    """What following wants of the node around it."""

    async def nearest_to(self, target: Node, wanted: int, *, fresh_s: float = limits.LOCATED_S) -> tuple[Contact, ...]:
        """The ``wanted`` nodes nearest to ``target`` or more, looked for where that is older than ``fresh_s``."""

    async def ask_for(self, contact: Contact, key: bytes, since: bytes, known: Sequence[bytes]) -> Found | None:
        """What a holder has under a key after a cursor, without the records whose fingerprints are ``known``."""

    def records_of(self, key: bytes) -> list[Record]:
        """What this node publishes and holds itself."""

    def correct(self, contact: Contact, records: Sequence[Record]) -> None:
        """Tell a holder what it lacks, in the background."""


@dataclass(slots=True)
class _Told:
    record: Record
    first_seen: float
    until: float
    tellers: dict[bytes, None] = field(default_factory=dict)


class Known:
    """What holders told of one key, by (publisher, subkey); bounded, and expiring."""

    def __init__(self) -> None:
        self._told: dict[RecordName, _Told] = {}
        self._cursors: dict[bytes, tuple[bytes, float]] = {}
        """Of each holder, and when it gave it."""
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._told)

    def cursor_of(self, holder: bytes) -> bytes:
        """What that holder gave with its last answer; empty for one that has told nothing."""
        return self._cursors[holder][0] if holder in self._cursors else b""

    def _told_at(self, holder: bytes) -> float:
        """When that holder has told all it had."""
        return self._cursors[holder][1] if self.cursor_of(holder) else float("-inf")

    def news_for(self, holder: bytes, now: float) -> list[Record]:
        """What that holder might tell though it is known: what was heard from others since its last answer.

        Not what is in the second half of its life: it is late for its renewal, and how long it has left isn't left to one holder.
        """
        since = self._told_at(holder)
        return [
            told.record
            for told in self._told.values()
            if told.first_seen >= since and told.until - now >= told.record.ttl_s / 2
        ]

    def keep_cursors_of(self, holders: Sequence[Contact]) -> None:
        """Nobody else will be asked."""
        ids = [contact.id for contact in holders]
        self._cursors = {holder: self._cursors[holder] for holder in ids if holder in self._cursors}

    def heard(self, holder: bytes, found: Found, now: float) -> None:
        """An answer. A record's life is never longer than from the first sight of this sequence; holders can only shorten it.

        Of one that ends with asking for the rest later, the cursor alone moves on: what the asker knew before it must be said again.
        """
        for record, left_s in zip(found.records, found.left_s, strict=True):
            told = self._told.get(record.name)
            if told is not None and record.sequence < told.record.sequence:
                continue
            until = now + min(left_s, float(record.ttl_s))
            if told is None or record.sequence > told.record.sequence:
                self._size_bytes += record.size_bytes - (0 if told is None else told.record.size_bytes)
                self._told[record.name] = _Told(record, now, until, {holder: None})
            else:
                told.until = max(told.until, min(until, told.first_seen + record.ttl_s))
                told.tellers[holder] = None
        told_at = self._told_at(holder) if found.later_s else now
        self._cursors[holder] = found.cursor, told_at
        self._make_room()

    def confirmed(self, holder: bytes, asked: Sequence[Record], lacks: Sequence[int]) -> None:
        """Of what it was asked with, that holder said what it ``lacks``: it has the rest, if that were all."""
        if len(lacks) >= limits.LACKS_TOLD_MAX:
            return
        for place, record in enumerate(asked):
            told = self._told.get(record.name)
            if place not in lacks and told is not None and told.record.sequence == record.sequence:
                told.tellers[holder] = None

    def live(self, now: float) -> list[Record]:
        """What isn't over."""
        return [record for record in self.latest(now) if not record.is_withdrawn]

    def latest(self, now: float) -> list[Record]:
        """As `live`, withdrawals too. What is over stays known for as long again: an old copy that somebody brings then is no news."""
        for name, told in list(self._told.items()):
            if now >= told.until + told.record.ttl_s:
                self._forget(name)
        return [told.record for told in self._told.values() if now < told.until]

    def lacked(self, lacking: Sequence[Record], now: float) -> list[Record]:
        """Of what a holder says that it lacks, what is known for a while: the rest may still be on its way.

        Not what lives for a minute: its publisher brings it again before anybody misses it.
        """
        since = now - limits.CORRECTED_AFTER_S
        found = [self._told[record.name] for record in lacking if record.name in self._told]
        old = [
            told.record
            for told in found
            if told.first_seen <= since and now < told.until and told.record.ttl_s > limits.SHORT_LIVED_S
        ]
        return old[: limits.CORRECTED_RECORDS_MAX]

    def _forget(self, name: RecordName) -> None:
        self._size_bytes -= self._told.pop(name).record.size_bytes

    def _make_room(self) -> None:
        """What one holder alone tells goes first, of the one that tells most of it, the latest first: others stay."""
        while len(self._told) > limits.RECORDS_PER_KEY_MAX or self._size_bytes > limits.BYTES_PER_KEY_MAX:
            alone: dict[bytes, list[RecordName]] = {}
            for name, told in self._told.items():
                if len(told.tellers) == 1:
                    alone.setdefault(next(iter(told.tellers)), []).append(name)
            if not alone:
                self._forget(next(reversed(self._told)))
                continue
            most = max(alone.values(), key=len)
            for name in most[-max(1, len(most) // 4) :]:
                self._forget(name)


@dataclass(slots=True)
class _Later:
    """A holder that said to ask it later."""

    until: float
    times: int
    """In a row."""


class FollowedKey:
    """One key, for one reader. Every method is for the loop's thread; reads of one key come one after the other."""

    def __init__(self, key: bytes, asker: Asker, salt: bytes, now: Callable[[], float]) -> None:
        self.key = key
        self._asker = asker
        self._salt = salt
        self._now = now
        self._target = Node(location_of(key))
        self._known = Known()
        self._reading = asyncio.Lock()
        self._turn = 0
        self._turned = now()
        self._later: dict[bytes, _Later] = {}
        self._began = self._waits_until = now()
        self._told_records = 0
        """By all answers so far, known ones among them."""
        self.answers = 0
        """How many answers the last read got."""

    async def read(self, *, thorough: bool = False) -> tuple[Record, ...]:
        """Live records: verified, merged, in a fixed order; ours and those this node holds are among them. Cancel-safe.

        Args:
            thorough: the holders are looked for anew, unless that was a moment ago, and half of them asked.
        """
        async with self._reading:
            fresh_s = limits.THOROUGH_S if thorough else limits.LOCATED_S
            located = await self._asker.nearest_to(self._target, limits.LOCATED_HOLDERS, fresh_s=fresh_s)
            holders = located[: limits.LOCATED_HOLDERS]  # a lookup hears of more, and those aren't everybody's
            self._known.keep_cursors_of(holders)
            self._later = {contact.id: self._later[contact.id] for contact in holders if contact.id in self._later}
            wanted = limits.READ_HOLDERS_THOROUGH if thorough else limits.READ_HOLDERS
            self.answers, self._began = 0, self._now()
            self._waits_until = self._began + limits.LATER_WAITED_S
            await self._ask_in_turn(self._order(holders), wanted)
            if self.answers and not self._known.live(self._now()):
                await self._ask_all(fresh_s)
        return self._merged()

    async def _ask_in_turn(self, order: list[Contact], wanted: int) -> None:
        """All at once where little is told; else one after the other while each tells much, so that no other tells it again."""
        told = 0 if 0 < len(self._known) <= limits.AT_ONCE_RECORDS_MAX else limits.MUCH_TOLD_RECORDS
        while told >= limits.MUCH_TOLD_RECORDS and self.answers < wanted:
            before, answers = self._told_records, self.answers
            await self._ask(order, answers + 1)
            if self.answers == answers:
                return
            told = self._told_records - before
        await self._ask(order, wanted)

    async def _ask_all(self, fresh_s: float) -> None:
        """Before a key is said to have no records: the nearest few may know only each other."""
        holders = await self._asker.nearest_to(self._target, limits.KSIZE, fresh_s=fresh_s)
        self._began = self._now()
        await self._ask(self._order(holders), self.answers + len(holders))

    def _merged(self) -> tuple[Record, ...]:
        merged: dict[RecordName, Record] = {}
        merge(merged, self._known.latest(self._now()))
        merge(merged, self._asker.records_of(self.key))
        live = [record for record in merged.values() if not record.is_withdrawn]
        return tuple(sorted(live, key=lambda record: record.name))

    def _order(self, holders: Sequence[Contact]) -> list[Contact]:
        """In an order of this reader's own, in which another one comes first now and then."""
        now = self._now()
        if now - self._turned >= limits.ROTATE_S:
            self._turned = now
            self._turn += 1
        drawn = sorted(holders, key=lambda contact: hashlib.sha256(self._salt + contact.id).digest())
        turn = self._turn % len(drawn) if drawn else 0
        return [*drawn[turn:], *drawn[:turn]]

    async def _ask(self, waiting: list[Contact], wanted: int) -> None:
        """Ask those waiting until ``wanted`` answered this read; who fails, is slow, or says later, is replaced by the next.

        In ``waiting`` stay those that weren't asked, or are to be asked later. Ends `LOOKUP_S` after the read began at the latest.
        """
        running: dict[asyncio.Task[bool | None], float] = {}
        waited_s: list[float] = []
        async with asyncio.TaskGroup() as tasks:
            try:
                async with asyncio.timeout(self._began + limits.LOOKUP_S - self._now()):
                    while True:
                        now, patience_s = self._now(), patience_of(waited_s)
                        late = sum(began + patience_s <= now for began in running.values())
                        while self.answers + len(running) - late < wanted:
                            contact = self._next(waiting, now)
                            if contact is None:
                                break
                            task = tasks.create_task(self._ask_one(contact, waiting), name="dht read")
                            running[task] = now
                        if self.answers >= wanted or not (running or (waiting and self._waits(now))):
                            return
                        turns = [began + patience_s for began in running.values() if began + patience_s > now]
                        turns += [until for contact in waiting if (until := self._later_until(contact)) > now]
                        turns += [self._waits_until] if self.answers and self._waits_until > now else []
                        turn_s = max(min(turns) - now, 0.001) if turns and waiting else None
                        if not running:
                            await asyncio.sleep(turn_s or 0.0)
                            continue
                        done, _ = await asyncio.wait(running, timeout=turn_s, return_when=asyncio.FIRST_COMPLETED)
                        for task in [task for task in running if task in done]:
                            took_s, answered = self._now() - running.pop(task), task.result()
                            if answered is not None:
                                waited_s.append(took_s)
                                self.answers += answered
            except TimeoutError:
                return
            finally:
                for task in running:
                    task.cancel()

    def _waits(self, now: float) -> bool:
        """Whether those that said later are waited for: while nobody answered, and for a while where nobody who did knew anything."""
        return not self.answers or (now < self._waits_until and not self._known.live(now))

    def _later_until(self, contact: Contact) -> float:
        return self._later[contact.id].until if contact.id in self._later else float("-inf")

    def _next(self, waiting: list[Contact], now: float) -> Contact | None:
        """The first that may be asked now, taken out of those waiting."""
        for place, contact in enumerate(waiting):
            if self._later_until(contact) <= now:
                return waiting.pop(place)
        return None

    async def _ask_one(self, contact: Contact, waiting: list[Contact]) -> bool | None:
        """Whether it answered; None where it says to ask it later: it waits again, and what it told before that counts."""
        since, news = self._known.cursor_of(contact.id), self._known.news_for(contact.id, self._now())
        found = await self._asker.ask_for(contact, self.key, since, [record.fingerprint for record in news])
        if found is None:
            return False
        now = self._now()
        if found.later_s:
            times = self._later[contact.id].times if contact.id in self._later else 0
            self._later[contact.id] = _Later(now + later_after(found.later_s, times), times + 1)
            waiting.append(contact)
            if not found.cursor:
                return None
        else:
            self._later.pop(contact.id, None)
        self._told_records += len(found.records)
        self._known.heard(contact.id, found, now)
        if not since:
            self._known.confirmed(contact.id, news, found.lacks)
        if lacking := self._known.lacked([news[place] for place in found.lacks], now):
            self._asker.correct(contact, lacking)
        return None if found.later_s else True
