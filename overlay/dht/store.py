"""What a holder keeps for others: bounded by key, publisher, peer and bytes; expiring from receipt. Pure.

A record's life begins when it was received and never grows: the same sequence again changes nothing. A full key keeps
by diversity of address groups, then by age.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from overlay.dht import limits
from overlay.dht.pages import Entry
from overlay.dht.records import Record, RecordName


class Put(Enum):
    """The outcome of offering a record; the values are on the wire."""

    STORED = "stored"
    UNCHANGED = "unchanged"
    STALE = "stale"
    FULL = "full"
    RATE = "rate"
    INVALID = "invalid"
    FOREIGN = "foreign"
    """From somebody else than its publisher: stored only when the publisher confirms it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A record in the store."""

    record: Record
    received: float
    expires: float
    group: str
    serial: int


class RecordStore:
    """Records by key; `expire` costs what expires, not what is kept."""

    def __init__(self, *, bytes_max: int = limits.STORE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._keys: dict[bytes, dict[RecordName, Held]] = {}
        self._due: list[tuple[float, int, bytes, RecordName]] = []
        self._per_publisher: Counter[bytes] = Counter()
        self._key_bytes: Counter[bytes] = Counter()
        self._shares: Counter[tuple[bytes, bytes]] = Counter()
        self._fingerprints: dict[bytes, Counter[bytes]] = {}
        self._serial = 0
        self.size_bytes = 0
        self.count = 0

    def put(self, record: Record, now: float, group: str = "") -> Put:
        """Offer a verified record that came from address group ``group``."""
        self.expire(now)
        held = self._keys.get(record.key, {}).get(record.name)
        if held is not None and record.sequence <= held.record.sequence:
            return Put.UNCHANGED if record.sequence == held.record.sequence else Put.STALE
        freed = 0 if held is None else held.record.size_bytes
        if self.size_bytes - freed + record.size_bytes > self._bytes_max:
            return Put.FULL
        if held is None:
            publisher = record.publisher.multihash
            if self._per_publisher[publisher] >= limits.RECORDS_PER_PUBLISHER_MAX:
                return Put.FULL
            if self._shares[record.key, publisher] >= limits.RECORDS_PER_KEY_AND_PUBLISHER_MAX:
                return Put.FULL
            if not self._has_room(record, group):
                return Put.FULL
        elif self._key_bytes[record.key] - freed + record.size_bytes > limits.BYTES_PER_KEY_MAX:
            return Put.FULL
        else:
            self._remove(held)
        self._serial += 1
        new = Held(record, now, now + record.ttl_s, group, self._serial)
        self._keys.setdefault(record.key, {})[record.name] = new
        heapq.heappush(self._due, (new.expires, new.serial, record.key, record.name))
        self._per_publisher[record.publisher.multihash] += 1
        self._key_bytes[record.key] += record.size_bytes
        self._shares[record.key, record.publisher.multihash] += 1
        self._fingerprints.setdefault(record.key, Counter())[record.fingerprint] += 1
        self.size_bytes += record.size_bytes
        self.count += 1
        self._compact()
        return Put.STORED

    def _has_room(self, record: Record, group: str) -> bool:
        """Room under a key, made if need be: the youngest record of the largest group gives way to a rarer group."""
        held = self._keys.get(record.key, {})
        size_bytes = self._key_bytes[record.key] + record.size_bytes
        if len(held) < limits.RECORDS_PER_KEY_MAX and size_bytes <= limits.BYTES_PER_KEY_MAX:
            return True
        groups = Counter(entry.group for entry in held.values())
        largest, count = max(groups.items(), key=lambda item: (item[1], item[0]))
        if groups[group] + 2 > count:
            return False
        youngest = max((entry for entry in held.values() if entry.group == largest), key=lambda entry: entry.serial)
        if size_bytes - youngest.record.size_bytes > limits.BYTES_PER_KEY_MAX:
            return False
        self._remove(youngest)
        return True

    def _remove(self, held: Held) -> None:
        record = held.record
        names = self._keys[record.key]
        del names[record.name]
        self._key_bytes[record.key] -= record.size_bytes
        fingerprints = self._fingerprints[record.key]
        fingerprints[record.fingerprint] -= 1
        if not fingerprints[record.fingerprint]:
            del fingerprints[record.fingerprint]
        if not names:
            del self._keys[record.key], self._key_bytes[record.key], self._fingerprints[record.key]
        publisher = record.publisher.multihash
        self._shares[record.key, publisher] -= 1
        if self._shares[record.key, publisher] <= 0:
            del self._shares[record.key, publisher]
        self._per_publisher[publisher] -= 1
        if self._per_publisher[publisher] <= 0:
            del self._per_publisher[publisher]
        self.size_bytes -= record.size_bytes
        self.count -= 1

    def _compact(self) -> None:
        """Entries of replaced records stay in the heap until due; rebuild when they are most of it."""
        if len(self._due) > 2 * self.count + 64:
            self._due = [
                (held.expires, held.serial, key, name)
                for key, names in self._keys.items()
                for name, held in names.items()
            ]
            heapq.heapify(self._due)

    def expire(self, now: float) -> None:
        """Forget what is due."""
        while self._due and self._due[0][0] <= now:
            _, serial, key, name = heapq.heappop(self._due)
            held = self._keys.get(key, {}).get(name)
            if held is not None and held.serial == serial:
                self._remove(held)

    def get(self, key: bytes, now: float) -> tuple[Record, ...]:
        """Live records of a key, tombstones too, the oldest first."""
        return tuple(entry.record for entry in self.newer(key, 0, now))

    def newer(self, key: bytes, serial: int, now: float) -> list[Entry]:
        """Those of `get` that were taken after ``serial``; costs what they are, not what is held."""
        self.expire(now)
        found = []
        for held in reversed(
            self._keys.get(key, {}).values()
        ):  # in the order of their serials: what is taken anew goes last
            if held.serial <= serial:
                break
            found.append(Entry(held.record, held.serial, held.expires - now))
        found.reverse()
        return found

    def fingerprints(self, key: bytes, now: float) -> Collection[bytes]:
        """Of what `get` gives."""
        self.expire(now)
        return self._fingerprints.get(key, ())

    def sequence_of(self, record: Record) -> int | None:
        """The held sequence under a record's name."""
        held = self._keys.get(record.key, {}).get(record.name)
        return None if held is None else held.record.sequence


class StoreRate:
    """So many stores per peer and minute, as a bucket that refills; the longest unseen peer is forgotten first."""

    def __init__(self, per_minute: int = limits.STORES_PER_PEER_PER_MINUTE) -> None:
        self._per_minute = float(per_minute)
        self._left: dict[bytes, tuple[float, float]] = {}

    def admit(self, peer: bytes, now: float) -> bool:
        """Whether one more store of ``peer`` may be looked at; counts it."""
        left, then = self._left.pop(peer, (self._per_minute, now))
        left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
        admitted = left >= 1
        self._left[peer] = (left - 1 if admitted else left, now)
        while len(self._left) > limits.PEERS_RATED_MAX:
            self._left.pop(next(iter(self._left)))
        return admitted
