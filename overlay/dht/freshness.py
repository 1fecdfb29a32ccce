"""When which part of the id space is looked into again: our own neighbourhood, and the parts farther and farther off. Pure.

Part ``d`` holds the ids that share ``d`` leading bits with ours, and no more. Whoever looks tells this file, and asks it what is due;
it reads the table, and changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from overlay.dht import limits
from overlay.dht.table import Table

NEVER = float("inf")


class Freshness:
    """Of one node's table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._self_due = 0.0
        self._self_every_s = limits.SELF_LOOKUP_S
        self._neighbourhood: Sequence[bytes] = ()
        self._looked_at: dict[int, float] = {}
        self._part_earliest = 0.0

    def begin(self, now: float) -> None:
        """The node starts."""
        self._self_due = now + limits.SELF_LOOKUP_LONELY_S
        self._part_earliest = now + limits.REFRESH_GAP_S

    def next_due(self) -> float:
        """When anything is due."""
        return min(self._self_due, self._part_due()[0])

    # --- our neighbourhood ---

    @property
    def _is_lonely(self) -> bool:
        return len(self._table) < int(self._table.ksize)

    def take_self(self, now: float) -> bool:
        """Whether our neighbourhood is to be looked at now; if so, somebody does, or tries."""
        if now < self._self_due:
            return False
        self._self_due = now + limits.SELF_LOOKUP_LONELY_S
        return True

    def looked_for_self(self, nearest: Sequence[bytes], now: float) -> None:
        """Our neighbours, as a lookup found them: the longer they stay the same, the seldomer."""
        is_same = nearest == self._neighbourhood and not self._is_lonely
        self._neighbourhood = nearest
        wished = 2 * self._self_every_s if is_same else limits.SELF_LOOKUP_S
        self._self_every_s = min(limits.SELF_LOOKUP_MAX_S, wished)
        self._self_due = now + (limits.SELF_LOOKUP_LONELY_S if self._is_lonely else self._self_every_s)

    def contact_left(self, now: float) -> bool:
        """The table shrank; whether so far that our neighbourhood is to be looked at soon."""
        if self._is_lonely:
            self._self_due = min(self._self_due, now + limits.SELF_LOOKUP_LONELY_S)
        return self._is_lonely

    def look_for_self_at(self, now: float) -> None:
        """Others may be near us since."""
        self._self_due = now

    # --- the parts ---

    @property
    def _parts(self) -> range:
        """Those beyond our neighbourhood, whether the table has a bucket for each or not.

        Kademlia looks into all of them when it joins (section 2.3): where nobody near us knows a part, lookups for what lies in it end
        among us.
        """
        beyond = self._table.depth_of(self._neighbourhood[-1]) if len(self._neighbourhood) >= self._table.ksize else 0
        return range(max(self._table.own_depth, beyond))

    def _part_due(self) -> tuple[float, int]:
        """When which part is due: the one that was looked into longest ago."""
        if not len(self._table):
            return NEVER, 0
        looked = [(self._looked_at.get(depth, -NEVER), depth) for depth in self._parts]
        at, depth = min(looked, default=(NEVER, 0))
        return max(at + limits.REFRESH_S, self._part_earliest), depth

    def take_part(self, now: float) -> int | None:
        """The part to look into now. One that others have filled by themselves needs no look after joining."""
        due, depth = self._part_due()
        if now < due:
            return None
        is_first = depth not in self._looked_at
        self._looked_at[depth] = now
        if is_first and self._table.count_at(depth) >= limits.CONTACTS_ENOUGH:
            return None
        self._part_earliest = now + limits.REFRESH_GAP_S
        return depth


def id_in_part(own_id: int, depth: int, drawn: bytes) -> bytes:
    """An id of that part, its lower bits those of ``drawn`` (`limits.ID_BYTES`)."""
    low_bits = limits.ID_BITS - depth - 1
    flipped = own_id ^ (1 << low_bits)
    low = int.from_bytes(drawn, "big") & ((1 << low_bits) - 1)
    return ((flipped >> low_bits << low_bits) | low).to_bytes(limits.ID_BYTES, "big")
