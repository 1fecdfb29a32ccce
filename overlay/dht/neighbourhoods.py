"""The nodes nearest to the keys that this node reads or publishes, as the last lookup found them. Pure.

A key that is read every few seconds, or renewed every half minute, isn't looked for each time. That the neighbourhood changed shows in
what its members say: one that doesn't answer leaves it, and one that names a node near the key that nobody named before makes it be
looked for anew. Such a look asks the strangers and the few nearest: members that answered a moment ago needn't show again that they
are there. Where something of ours is published, others who look for the key are told who its members are.
"""

from __future__ import annotations

from collections import Counter
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
    around: tuple[Contact, ...]
    """Who else its lookup heard of, the nearest of them: where to go on from when more are wanted, or members leave."""
    seen: dict[bytes, None]
    """Ids that its lookup saw, members or not: one that was named and didn't answer is no news."""
    located: float
    answered: dict[bytes, float]
    """When each member last did."""
    patience_s: float
    """The least time until it is looked for again; longer where looking found the same: whoever names strangers gains nothing by it."""
    has_changed: bool = False
    strangers: dict[bytes, Contact] = field(default_factory=dict)
    """Who was named since, and is nearer than a member; with `limits.KSIZE` of them nobody is added any more."""

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

    def located(
        self,
        place: bytes,
        members: Sequence[Contact],
        wanted: int,
        named: Sequence[Contact],
        failed: Iterable[bytes],
        now: float,
        assumed: Sequence[Contact] = (),
    ) -> None:
        """A lookup for ``wanted`` nodes found ``members``, heard of all that were ``named``, and of them ``failed`` to answer.

        ``assumed``: members before that weren't asked by it, see `start`. Who didn't answer somebody else meanwhile is none any more.
        """
        before = self._known.pop(place, None)
        answered_before = {} if before is None else before.answered
        lost = {contact.id for contact in assumed if before is None or contact.id not in before.members}
        by_id = {contact.id: contact for contact in members if contact.id not in lost}
        patience_s = limits.RELOCATE_S
        if before is not None and not lost and list(before.members) == list(by_id):
            patience_s = min(2 * before.patience_s, limits.LOCATED_S)
        seen = dict.fromkeys(contact.id for contact in named) | dict.fromkeys(failed) | dict.fromkeys(by_id)
        around = tuple([contact for contact in named if contact.id not in by_id][: limits.KSIZE])
        answered = dict.fromkeys(by_id, now)
        answered |= {contact.id: answered_before[contact.id] for contact in assumed if contact.id in answered}
        self._known[place] = _Neighbourhood(
            by_id, len(members), wanted, around, seen, now, answered, patience_s, has_changed=bool(lost)
        )
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

    def start(self, place: bytes, now: float, fresh_s: float = limits.LOCATED_S) -> tuple[list[Contact], list[Contact]]:
        """Where to begin to look for it again, and who of those needn't be asked: members that answered lately, but the nearest few.

        Nothing where there were fewer than were looked for: then everybody is asked.
        """
        known = self._known.get(place)
        if known is None or known.is_lonely:
            return [], []
        members = list(known.members.values())
        since = now - min(fresh_s, limits.ANSWERED_S)
        answered = [contact for contact in members[limits.ASKED_AGAIN :] if known.answered[contact.id] > since]
        return [*members, *known.strangers.values(), *known.around], answered

    def told(self, place: bytes, now: float, others: Sequence[Contact]) -> list[Contact]:
        """The nearest members that aren't among ``others`` who are named there anyway.

        Together there are no more of one address group than a bucket may hold, unless the others alone are.
        """
        known = self._known.get(place)
        if known is None or now - known.located >= limits.LOCATED_S:
            return []
        there, groups = {contact.id for contact in others}, Counter(contact.group for contact in others)
        found: list[Contact] = []
        for contact in list(known.members.values())[: limits.LOCATED_HOLDERS]:
            if contact.id in there or (contact.group and groups[contact.group] >= limits.CONTACTS_PER_GROUP_AND_BUCKET):
                continue
            groups[contact.group] += 1
            found.append(contact)
        return found

    def gone(self, contact: Contact) -> None:
        """It serves nobody any more, wherever it was a member."""
        for known in self._known.values():
            known.members.pop(contact.id, None)

    def named(self, place: bytes, member: Contact, contacts: Iterable[Contact], now: float) -> None:
        """A member said who is near: when some strangers are nearer than our farthest member, the neighbourhood has changed."""
        known = self._known.get(place)
        if known is None or not known.members:
            return
        if member.id in known.members:
            known.answered[member.id] = now
        if len(known.strangers) >= limits.KSIZE:
            return
        new = [contact for contact in contacts if contact.id not in known.seen and contact.id not in known.strangers]
        if not new:
            return
        here = int.from_bytes(place, "big")
        farthest = max(member.long_id ^ here for member in known.members.values())
        near = [contact for contact in new if known.is_lonely or contact.long_id ^ here < farthest]
        known.strangers |= {contact.id: contact for contact in near}
        known.has_changed |= limits.CHANGED_SHARE * len(known.strangers) >= min(known.found, limits.NEAR)

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
