"""Lookups: kademlia's crawl with `ALPHA` requests always in flight instead of rounds that wait for the slowest.

Ends when the k closest candidates answered, or at a cap of requests or seconds; returns what it has then. Knows no wire:
``protocol`` gives validated answers and never raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kademlia.crawling import SpiderCrawl
from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.records import Record, RecordName, merge
from overlay.dht.table import CandidateHeap, Contact


@dataclass(frozen=True, slots=True)
class Found:
    """A validated answer: nodes nearer to the target, and what the peer holds under the key."""

    contacts: tuple[Contact, ...]
    records: tuple[Record, ...] = ()


class LookupProtocol(Protocol):
    """What a lookup asks with; None for no answer."""

    async def call_find_node(self, contact: Contact, target: Node) -> Found | None: ...
    async def call_find_value(self, contact: Contact, key: bytes, target: Node) -> Found | None: ...


class NodeLookup(SpiderCrawl):
    """Finds the k nodes closest to a target."""

    def __init__(
        self, protocol: LookupProtocol, target: Node, contacts: Sequence[Contact], ksize: int, own_id: bytes
    ) -> None:
        super().__init__(protocol, target, [], ksize, limits.ALPHA)
        self.nearest = CandidateHeap(target, ksize)
        self.nearest.push(list(contacts))
        self.answered: dict[bytes, Contact] = {}
        self.seen: dict[bytes, Contact] = {contact.id: contact for contact in contacts}
        """Whom we started from or were told of; bounded by the requests and k."""
        self.requests = 0
        self._own_id = own_id
        self._failed: set[bytes] = set()

    async def find(self) -> list[Contact]:
        """Those of the k closest that answered, the closest first. Cancel-safe."""
        try:
            async with asyncio.timeout(limits.LOOKUP_S):
                await self._crawl()
        except TimeoutError:
            pass  # what was found so far is the answer
        return [contact for contact in self.nearest if contact.id in self.answered]

    async def _crawl(self) -> None:
        running: dict[asyncio.Task[Found | None], Contact] = {}
        async with asyncio.TaskGroup() as tasks:
            try:
                while not self._is_complete():
                    for contact in self.nearest.get_uncontacted()[: self.alpha - len(running)]:
                        if self.requests >= limits.LOOKUP_RPCS_MAX:
                            break
                        self.requests += 1
                        self.nearest.mark_contacted(contact)
                        running[tasks.create_task(self._ask(contact), name="dht lookup")] = contact
                    if not running:
                        return
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in running if task in done]:
                        self._heard(running.pop(task), task.result())
            finally:
                for task in running:
                    task.cancel()

    def _ask(self, contact: Contact) -> Coroutine[Any, Any, Found | None]:
        found: Coroutine[Any, Any, Found | None] = self.protocol.call_find_node(contact, self.node)
        return found

    def _heard(self, contact: Contact, found: Found | None) -> None:
        if found is None:
            self._failed.add(contact.id)
            self.nearest.remove([contact.id])
            return
        self.answered[contact.id] = contact
        new = [node for node in found.contacts if node.id != self._own_id and node.id not in self._failed]
        self.nearest.push(new)
        for node in new:
            self.seen.setdefault(node.id, node)

    def _is_complete(self) -> bool:
        return all(node.id in self.answered for node in self.nearest)


class ValueLookup(NodeLookup):
    """Gathers a key's records from a quorum of the closest nodes, merged by (publisher, subkey)."""

    def __init__(
        self, protocol: LookupProtocol, key: bytes, target: Node, contacts: Sequence[Contact], ksize: int, own_id: bytes
    ) -> None:
        super().__init__(protocol, target, contacts, ksize, own_id)
        self.key = key
        self.merged: dict[RecordName, Record] = {}
        self._held: dict[bytes, dict[RecordName, int]] = {}

    def _ask(self, contact: Contact) -> Coroutine[Any, Any, Found | None]:
        found: Coroutine[Any, Any, Found | None] = self.protocol.call_find_value(contact, self.key, self.node)
        return found

    def _heard(self, contact: Contact, found: Found | None) -> None:
        super()._heard(contact, found)
        if found is not None:
            merge(self.merged, found.records)
            self._held[contact.id] = {record.name: record.sequence for record in found.records}

    def _is_complete(self) -> bool:
        closest = list(self.nearest)
        quorum = max(1, self.ksize // 2)
        return all(node.id in self.answered for node in closest[:quorum])

    def corrections(self) -> list[tuple[Contact, list[Record]]]:
        """For the closest holders that answered with less than is known: what they lack."""
        found = []
        for contact in self.nearest:
            held = self._held.get(contact.id)
            if held is None:
                continue
            lacking = [record for name, record in self.merged.items() if held.get(name, -1) < record.sequence]
            if lacking:
                found.append((contact, lacking[: limits.CORRECTED_RECORDS_MAX]))
            if len(found) >= limits.CORRECTED_HOLDERS_MAX:
                break
        return found
