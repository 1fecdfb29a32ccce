"""Continuous iterative lookups on `kademlia`'s crawl base: alpha calls always under way, exact ends, bounded in every way.

Replaces the rounds of `SpiderCrawl._find` (a round waits for its slowest member) and keeps its heap and constructor. Answers are
validated entry by entry before they get here; a lookup ends when the k closest known have answered, or at a bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol, cast

from kademlia.crawling import SpiderCrawl
from kademlia.node import NodeHeap

from overlay.dht import limits
from overlay.dht.records import Record, merge_records
from overlay.dht.table import Contact, Target


class Found:
    """What one peer answered: closer contacts, and records when they were asked for."""

    __slots__ = ("contacts", "records")

    def __init__(self, contacts: list[Contact], records: tuple[Record, ...] = ()) -> None:
        self.contacts = contacts
        self.records = records


class Caller(Protocol):
    """The validating call layer; never raises: None stands for no (usable) answer."""

    async def find_node(self, contact: Contact, target: bytes) -> Found | None: ...
    async def find_value(self, contact: Contact, key: bytes) -> Found | None: ...


class BoundedHeap(NodeHeap):  # type: ignore[misc]
    """`NodeHeap` with constant-time membership and a bound on what strangers can push."""

    def __init__(self, node: Target, maxsize: int) -> None:
        super().__init__(node, maxsize)
        self._seen: set[bytes] = set()

    def push(self, nodes: list[Contact]) -> None:
        for node in nodes:
            if node.id not in self._seen and len(self._seen) < limits.HEAP_NODES_MAX:
                self._seen.add(node.id)
                super().push(node)

    def __contains__(self, node: object) -> bool:
        return False  # `push` has looked already


class NodeLookup(SpiderCrawl):  # type: ignore[misc]
    """Finds the k closest live contacts to a point."""

    def __init__(
        self,
        caller: Caller,
        target: Target,
        start: Sequence[Contact],
        own_id: bytes,
        ksize: int = limits.KSIZE,
        alpha: int = limits.ALPHA,
    ) -> None:
        super().__init__(caller, target, [], ksize, alpha)
        self.nearest = BoundedHeap(target, ksize)
        self.nearest.push(list(start))
        self._own_id = own_id
        self.calls = 0
        self.answered: dict[bytes, Found] = {}

    async def find(self) -> list[Contact]:
        """The closest contacts that answered, nearest first."""
        await self._find(self._ask)
        return [cast(Contact, contact) for contact in self.nearest if contact.id in self.answered]

    async def _ask(self, contact: Contact) -> Found | None:
        return cast("Found | None", await self.protocol.find_node(contact, self.node.id))

    def is_satisfied(self) -> bool:
        """Whether the lookup may end before the k closest have answered."""
        return False

    async def _find(self, rpcmethod: object) -> None:
        under_way: dict[asyncio.Task[Found | None], Contact] = {}
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.LOOKUP_TIMEOUT_S):
                while not self.is_satisfied():
                    for contact in self.nearest.get_uncontacted()[: self.alpha - len(under_way)]:
                        if self.calls >= limits.LOOKUP_RPCS_MAX:
                            break
                        self.calls += 1
                        self.nearest.mark_contacted(contact)
                        under_way[loop.create_task(self._ask(contact), name="dht lookup")] = contact
                    if not under_way:
                        return
                    done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in under_way if task in done]:
                        self._take(under_way.pop(task), task.result())
        except TimeoutError:
            return
        finally:
            for task in under_way:
                task.cancel()

    def _take(self, contact: Contact, found: Found | None) -> None:
        if found is None:
            self.nearest.remove([contact.id])
            return
        self.answered[contact.id] = found
        self.nearest.push([other for other in found.contacts if other.id != self._own_id])


class ValueLookup(NodeLookup):
    """Collects a key's records from the k closest, merges them, and knows who holds stale ones."""

    async def _ask(self, contact: Contact) -> Found | None:
        return cast("Found | None", await self.protocol.find_value(contact, self.node.id))

    def is_satisfied(self) -> bool:
        """Half of the closest agree on the path: a quorum, since records are signed and only the newest counts."""
        closest = list(self.nearest)
        answers = [contact for contact in closest if contact.id in self.answered]
        with_records = [contact for contact in answers if self.answered[contact.id].records]
        return bool(len(closest) >= self.ksize and len(with_records) > self.ksize // 2)

    def records(self) -> tuple[Record, ...]:
        """The newest of every slot."""
        return merge_records(record for found in self.answered.values() for record in found.records)

    def stale_holders(self) -> list[tuple[Contact, list[Record]]]:
        """Of the closest that answered: whom to send which newer records."""
        merged = self.records()
        stale = []
        for contact in list(self.nearest):
            found = self.answered.get(contact.id)
            if found is None:
                continue
            held = {record.slot: record.sequence for record in found.records}
            missing = [record for record in merged if held.get(record.slot, -1) < record.sequence]
            if missing:
                stale.append((cast(Contact, contact), missing[: limits.RECORDS_PER_CALL]))
        return stale
