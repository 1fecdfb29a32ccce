"""Our own records at their holders: offered to the nodes nearest to their keys on change and at half-life, and to who is new there.

Owns the conversation with holders; what is ours and when it is due is `publishing`'s, who is near a key `neighbourhoods`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from kademlia.node import Node

from overlay.dht.neighbourhoods import Neighbourhoods
from overlay.dht.protocol import DhtProtocol
from overlay.dht.publishing import Publication, Publications
from overlay.dht.store import Put
from overlay.dht.table import Contact

TAKEN = (Put.STORED, Put.UNCHANGED)


class Surroundings(Protocol):
    """What offering wants of the node around it."""

    async def nearest_to(self, target: Node, wanted: int) -> tuple[Contact, ...]:
        """The ``wanted`` nodes nearest to ``target`` or more."""

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> bool:
        """Run it in the background, once per name."""


class Offering:
    """Offers publications. ``ksize``: how many holders each is to have, but short-lived ones; ``offered`` hears when one was."""

    def __init__(
        self,
        publications: Publications,
        neighbourhoods: Neighbourhoods,
        protocol: DhtProtocol,
        around: Surroundings,
        ksize: int,
        now: Callable[[], float],
        offered: Callable[[], None],
    ) -> None:
        self._publications = publications
        self._neighbourhoods = neighbourhoods
        self._protocol = protocol
        self._around = around
        self._ksize = ksize
        self._now = now
        self._offered = offered

    def offer_soon(self, publication: Publication) -> None:
        """In the background."""
        self._around.spawn(_name_of(publication), self.offer(publication))

    async def offer(self, publication: Publication) -> None:
        """Offer a record to the closest nodes; whatever newer value came meanwhile is offered at the next upkeep."""
        self._publications.under_way(publication, self._now())
        place = Node(publication.location)
        copies = publication.copies(self._ksize)
        contacts = (await self._around.nearest_to(place, copies))[:copies]
        record = publication.record
        answers = await asyncio.gather(*(self._protocol.call_store(contact, [record], place) for contact in contacts))
        holders = []
        for contact, answer in zip(contacts, answers, strict=True):
            if answer is None:
                self._neighbourhoods.lost(place.id, contact)
                self._neighbourhoods.changed(place.id)  # somebody is missing: look again before the next offer
                continue
            self._neighbourhoods.named(place.id, contact, answer.contacts, self._now())
            outcome, held = answer.outcomes[0]
            if outcome in TAKEN:
                holders.append(contact)
            elif outcome is Put.STALE:
                self._publications.overtaken(held)
        outcomes = [answer.outcomes[0][0] for answer in answers if answer is not None]
        is_full = bool(outcomes) and all(outcome is Put.FULL for outcome in outcomes)
        self._publications.offered(publication, holders, self._now(), is_full=is_full)
        self._offered()
        if not self._neighbourhoods.members(place.id, copies, self._now()):  # as the answers just showed
            found = await self._around.nearest_to(place, copies)
            await self._fill_up(
                publication, [contact for contact in found[:copies] if contact.id not in publication.holders]
            )

    def neighbourhood_found(self, place: bytes, members: Sequence[Contact]) -> None:
        """A key's neighbourhood was looked for: those who are new in it get our records of that key at once."""
        for publication, lacking in self._publications.lacked_by(place, members, self._ksize):
            self._around.spawn(_name_of(publication), self._fill_up(publication, lacking))

    async def _fill_up(self, publication: Publication, lacking: Sequence[Contact]) -> None:
        for contact in lacking:
            if not self._publications.is_current(publication):
                break
            answer = await self._protocol.call_store(contact, [publication.record])
            if answer is not None and answer.outcomes[0][0] in TAKEN:
                self._publications.handed_over(publication, contact)
        self._offered()  # whatever newer value came meanwhile is due

    async def hand_over(self, contact: Contact) -> None:
        """Give a new contact those of our records that it is near enough to hold."""
        wanted = self._publications.wanted_by(contact, self._ksize)
        if not wanted:
            return
        answer = await self._protocol.call_store(contact, [entry.record for entry in wanted])
        for entry, (outcome, _) in zip(wanted, answer.outcomes if answer is not None else (), strict=False):
            if outcome in TAKEN:
                self._publications.handed_over(entry, contact)


def _name_of(publication: Publication) -> str:
    """Of the task that offers it: one at a time."""
    record = publication.record
    return f"publish {record.key.hex()} {record.subkey.hex()}"
