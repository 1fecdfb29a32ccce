"""The nodes nearest to the keys that this node reads or publishes, as the last lookup found them. Pure.

A key that is read every few seconds, or renewed every half minute, isn't looked for each time. That the neighbourhood changed shows in
what its members say: one that doesn't answer leaves it, and one that names a node near the key that nobody named before makes it be
looked for anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from overlay.dht import limits
from overlay.dht.table import Contact


@dataclass(slots=True)
class _Neighbourhood:
    members: dict[bytes, Contact]
    """By id, the nearest first."""
    found: int
    """How many there were."""
    wanted: int
    """How many were looked for."""
    seen: dict[bytes, None]
    """Ids that its lookup saw, members or not: one that was named and didn't answer is no news."""
    located: float
    patience_s: float
    """The least time until it is looked for again; longer where looking found the same: whoever names strangers gains nothing by it."""
    has_changed: bool = False
    strangers: dict[bytes, None] = field(default_factory=dict)
    """Who was named since, and is nearer than a member; counted until there are enough of them."""

    @property
    def is_lonely(self) -> bool:
        """Whether there were fewer than were looked for: all that there is, maybe."""
        return self.found < self.wanted


class Neighbourhoods:
    """By place in the id space; the longest unused of more than `limits.NEIGHBOURHOODS_MAX` is forgotten."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Neighbourhood] = {}

    def __len__(self) -> int:
        return len(self._known)

    def located(self, place: bytes, members: Sequence[Contact], wanted: int, seen: Iterable[bytes], now: float) -> None:
        """A lookup for ``wanted`` nodes found ``members``, and saw ``seen``."""
        before = self._known.pop(place, None)
        by_id = {contact.id: contact for contact in members}
        patience_s = limits.RELOCATE_S
        if before is not None and list(before.members) == list(by_id):
            patience_s = min(2 * before.patience_s, limits.LOCATED_S)
        names = dict.fromkeys(seen) | dict.fromkeys(by_id)
        self._known[place] = _Neighbourhood(by_id, len(by_id), wanted, names, now, patience_s)
        while len(self._known) > limits.NEIGHBOURHOODS_MAX:
            del self._known[next(iter(self._known))]

    def members(self, place: bytes, wanted: int, now: float, fresh_s: float = limits.LOCATED_S) -> tuple[Contact, ...]:
        """The ``wanted`` nearest or more, as found in the last ``fresh_s``; empty where they have to be looked for."""
        known = self._known.get(place)
        if known is None or not known.members or known.wanted < wanted:
            return ()
        age_s = now - known.located
        if age_s >= min(fresh_s, limits.LOCATED_LONELY_S if known.is_lonely else limits.LOCATED_S):
            return ()
        is_worn = known.has_changed or 2 * len(known.members) < known.found
        if is_worn and age_s >= known.patience_s:
            return ()
        self._known[place] = self._known.pop(place)
        return tuple(known.members.values())

    def wanted(self, place: bytes) -> int:
        """How many were looked for there the last time."""
        known = self._known.get(place)
        return 0 if known is None else known.wanted

    def named(self, place: bytes, contacts: Iterable[Contact]) -> None:
        """A member said who is near: when some strangers are nearer than our farthest member, the neighbourhood has changed."""
        known = self._known.get(place)
        if known is None or not known.members or known.has_changed:
            return
        new = [contact for contact in contacts if contact.id not in known.seen and contact.id not in known.strangers]
        if not new:
            return
        here = int.from_bytes(place, "big")
        farthest = max(member.long_id ^ here for member in known.members.values())
        near = [contact.id for contact in new if known.is_lonely or contact.long_id ^ here < farthest]
        known.strangers |= dict.fromkeys(near)
        known.has_changed = limits.CHANGED_SHARE * len(known.strangers) >= min(known.found, limits.NEAR)

    def lost(self, place: bytes, contact: Contact) -> None:
        """A member didn't answer."""
        known = self._known.get(place)
        if known is not None:
            known.members.pop(contact.id, None)

    def changed(self, place: bytes) -> None:
        """Something there isn't as it was: to be looked at before the next use, if the last look wasn't a moment ago."""
        known = self._known.get(place)
        if known is not None:
            known.has_changed = True
