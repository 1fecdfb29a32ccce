"""Our own records: sequence numbers, tombstones, and when each is due to be published again. Pure.

A record is published on change and at half its life; who holds it is remembered, so that a contact nearer to its key
than the farthest holder gets it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nsmallest

from overlay.dht import limits
from overlay.dht.pages import Entry
from overlay.dht.records import Record, location_of, seal_record
from overlay.dht.table import Contact
from overlay.errors import LimitExceeded
from overlay.identity import Identity


@dataclass(slots=True)
class Publication:
    """One (key, subkey) of ours."""

    record: Record
    due: float
    expires: float
    holders: dict[bytes, int] = field(default_factory=dict)
    """Node ids that took this very record, and their distance to the key."""
    ever_offered: bool = False
    is_abandoned: bool = False
    """Not to be renewed."""
    serial: int = 0
    """Of all values that this node set: what is newer has the higher one."""

    @property
    def location(self) -> bytes:
        return location_of(self.record.key)

    def copies(self, ksize: int) -> int:
        """At how many of the nodes nearest to its key it is to be."""
        return min(ksize, limits.COPIES_OF_SHORT_LIVED) if self.record.ttl_s <= limits.SHORT_LIVED_S else ksize

    @property
    def ends(self) -> bool:
        """Whether it is over at ``expires``, and not renewed before."""
        return self.record.is_withdrawn or self.is_abandoned


class Publications:
    """All of ours, by (key, subkey)."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._entries: dict[tuple[bytes, bytes], Publication] = {}
        self._last_sequence = 0
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float, now: float, wall_s: float) -> Publication:
        """A new value (empty withdraws) under a new sequence. Raises LimitExceeded."""
        name = (key, subkey)
        if name not in self._entries and len(self._entries) >= limits.PUBLISHED_MAX:
            raise LimitExceeded(f"At most {limits.PUBLISHED_MAX} records are published by one node.")
        life_s = max(1, min(limits.TTL_S_MAX, round(ttl_s)))
        self._last_sequence = max(self._last_sequence + 1, int(wall_s * 1000))
        record = seal_record(self._identity, key, subkey, self._last_sequence, life_s, value)
        before = self._entries.get(name)
        self._serial += 1
        publication = Publication(record, now, now + life_s, ever_offered=before is not None, serial=self._serial)
        self._entries[name] = publication
        return publication

    def get(self, key: bytes, subkey: bytes) -> Publication | None:
        return self._entries.get((key, subkey))

    def abandon(self, key: bytes, subkey: bytes) -> None:
        """Renew it no more; holders forget it at the end of its life, and until then it can be withdrawn."""
        entry = self._entries.get((key, subkey))
        if entry is not None:
            entry.is_abandoned = True

    def is_current(self, publication: Publication) -> bool:
        """Whether no newer value replaced it."""
        record = publication.record
        return self._entries.get((record.key, record.subkey)) is publication

    def overtaken(self, sequence: int) -> None:
        """A holder has a later record of ours, from before our wall clock was set back: go on from there."""
        self._last_sequence = max(self._last_sequence, min(sequence, limits.SEQUENCE_MAX - 2**32))

    def lacked_by(
        self, place: bytes, members: Sequence[Contact], ksize: int
    ) -> list[tuple[Publication, list[Contact]]]:
        """What lies at ``place``, has been out, and isn't held by some of ``members``; with those."""
        found = []
        for entry in self._entries.values():
            if entry.ever_offered and not entry.is_abandoned and entry.location == place:
                nearest = members[: entry.copies(ksize)]
                lacking = [contact for contact in nearest if contact.id not in entry.holders]
                if lacking:
                    found.append((entry, lacking))
        return found

    def lies_at(self, place: bytes) -> bool:
        """Whether something of ours is published there, so that everybody may know that we know who is near."""
        return any(entry.location == place and not entry.is_abandoned for entry in self._entries.values())

    def records_of(self, key: bytes) -> list[Record]:
        """What we publish under a key, tombstones too."""
        return [entry.record for (found, _), entry in self._entries.items() if found == key]

    def newer(self, key: bytes, serial: int, now: float) -> list[Entry]:
        """What was set under a key after ``serial``, tombstones too, in that order."""
        found = [
            Entry(entry.record, entry.serial, entry.expires - now if entry.ends else float(entry.record.ttl_s))
            for (at, _), entry in self._entries.items()
            if at == key and entry.serial > serial
        ]
        return sorted(found, key=lambda entry: entry.serial)

    def due(self, now: float) -> list[Publication]:
        """Those to send out now; what has outlived its use is forgotten: tombstones, and what was abandoned."""
        for name, entry in list(self._entries.items()):
            if entry.ends and now >= entry.expires:
                del self._entries[name]
        return [entry for entry in self._entries.values() if now >= entry.due and not entry.is_abandoned]

    def next_due(self) -> float:
        """When something is due next."""
        dues = [
            entry.expires if entry.is_abandoned else min(entry.due, entry.expires) if entry.ends else entry.due
            for entry in self._entries.values()
        ]
        return min(dues, default=float("inf"))

    def renewed(self, publication: Publication, now: float, wall_s: float) -> Publication:
        """The same value under a new sequence, once it has been out: the same sequence renews nothing at holders."""
        record = publication.record
        if record.is_withdrawn or not publication.ever_offered:
            return publication
        return self.set(record.key, record.subkey, record.value, record.ttl_s, now, wall_s)

    def under_way(self, publication: Publication, now: float) -> None:
        """It is being offered: not due again before that has ended, or failed."""
        publication.due = now + limits.LOOKUP_S

    def offered(self, publication: Publication, holders: list[Contact], now: float, *, is_full: bool = False) -> None:
        """Those contacts hold it now: due again at half its life, or soon when nobody took it and not for want of room."""
        for contact in holders:
            self.handed_over(publication, contact)
        publication.ever_offered = bool(holders) or publication.ever_offered
        half = publication.record.ttl_s / 2
        publication.due = now + (half if holders or is_full else min(half, limits.REPUBLISH_RETRY_S))

    def handed_over(self, publication: Publication, contact: Contact) -> None:
        """That contact holds it."""
        publication.holders[contact.id] = contact.long_id ^ int.from_bytes(publication.location, "big")
        publication.ever_offered = True

    def wanted_by(self, contact: Contact, ksize: int) -> list[Publication]:
        """What a new contact should hold: it is nearer than one of the nearest holders that there are to be, or there are too few."""
        wanted = []
        for entry in self._entries.values():
            if contact.id in entry.holders or entry.is_abandoned:
                continue  # it would live on there after we have forgotten it
            distance = contact.long_id ^ int.from_bytes(entry.location, "big")
            copies = entry.copies(ksize)
            if len(entry.holders) < copies or distance < nsmallest(copies, entry.holders.values())[-1]:
                wanted.append(entry)
        return wanted[: limits.STORE_RECORDS_MAX]
