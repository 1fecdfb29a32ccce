"""What this node holds for others: bounded, expiring, merged by sequence. Pure.

Life is counted from receipt and never extended by a copy of the same version. A full key keeps records by the diversity of
their publishers' address groups, then by age. Expiry is a heap, not a scan.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

from overlay.dht import limits
from overlay.dht.records import Record


class Outcome(Enum):
    """What became of a store."""

    STORED = "stored"
    KNOWN = "known"
    OLD = "old"
    FULL = "full"
    RATE = "rate"


@dataclass(slots=True)
class _Held:
    record: Record
    expires: float
    group: str
    since: float


Slot = tuple[bytes, bytes]


class RecordStore:
    """See the module. ``group`` names a publisher's address group, given by who knows its connection."""

    def __init__(self, *, bytes_max: int = limits.STORE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._keys: dict[bytes, dict[Slot, _Held]] = {}
        self._expiry: list[tuple[float, bytes, Slot]] = []
        self._publishers: Counter[bytes] = Counter()
        self._bytes = 0
        self._rates: dict[bytes, tuple[float, int]] = {}

    def admit(self, peer: bytes, count: int, now: float) -> bool:
        """Whether ``peer`` may store ``count`` more within this minute."""
        since, used = self._rates.pop(peer, (now, 0))
        if now - since >= 60:
            since, used = now, 0
        self._rates[peer] = (since, used + count)
        while len(self._rates) > limits.PEERS_COUNTED:
            del self._rates[next(iter(self._rates))]
        return used + count <= limits.STORES_PER_PEER_MINUTE

    def put(self, record: Record, group: str, now: float) -> Outcome:
        """Hold a verified record until its own time is over."""
        slots = self._keys.get(record.key, {})
        held = slots.get(record.slot)
        if held is not None and held.expires > now:
            if record.sequence < held.record.sequence:
                return Outcome.OLD
            if record.sequence == held.record.sequence:
                return Outcome.KNOWN
        size = record.size_bytes - (held.record.size_bytes if held is not None else 0)
        publisher = record.publisher.multihash
        if held is None and self._publishers[publisher] >= limits.RECORDS_PER_PUBLISHER:
            return Outcome.FULL
        if self._bytes + size > self._bytes_max:
            return Outcome.FULL
        if held is None and len(slots) >= limits.RECORDS_PER_KEY and not self._make_room(record.key, slots, group):
            return Outcome.FULL
        if held is not None:
            self._remove(record.key, record.slot)
        expires = now + record.left_s
        self._keys.setdefault(record.key, {})[record.slot] = _Held(record, expires, group, now)
        self._publishers[publisher] += 1
        self._bytes += record.size_bytes
        heapq.heappush(self._expiry, (expires, record.key, record.slot))
        return Outcome.STORED

    def _make_room(self, key: bytes, slots: dict[Slot, _Held], group: str) -> bool:
        """Drop the youngest record of the most crowded group, if that isn't the newcomer's own."""
        crowds = Counter(held.group for held in slots.values())
        crowded, count = max(crowds.items(), key=lambda item: (item[1], item[0]))
        if count <= crowds[group] + 1:
            return False
        youngest = max((held.since, slot) for slot, held in slots.items() if held.group == crowded)
        self._remove(key, youngest[1])
        return True

    def get(self, key: bytes, now: float) -> tuple[Record, ...]:
        """Live records of a key with the time that is left to each; withdrawals too, so that they win over older copies."""
        return tuple(
            replace(held.record, left_s=held.expires - now)
            for held in self._keys.get(key, {}).values()
            if held.expires > now
        )

    def keys(self) -> tuple[bytes, ...]:
        return tuple(sorted(self._keys))

    def expire(self, now: float) -> None:
        """Drop what is over."""
        while self._expiry and self._expiry[0][0] <= now:
            _, key, slot = heapq.heappop(self._expiry)
            held = self._keys.get(key, {}).get(slot)
            if held is not None and held.expires <= now:
                self._remove(key, slot)

    def _remove(self, key: bytes, slot: Slot) -> None:
        slots = self._keys[key]
        held = slots.pop(slot)
        if not slots:
            del self._keys[key]
        self._bytes -= held.record.size_bytes
        self._publishers[slot[0]] -= 1
        if not self._publishers[slot[0]]:
            del self._publishers[slot[0]]

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return sum(len(slots) for slots in self._keys.values())
