"""Lookups: kademlia's crawl with `ALPHA` requests always in flight instead of rounds that wait for the slowest.

Ends when the k closest candidates answered, or at a cap of requests or seconds; returns what it has then. A candidate that keeps the
lookup waiting (it is dead, most likely) is passed over: others are asked in its place, and it counts again should it answer.
Knows no wire: ``protocol`` gives validated answers and never raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from statistics import median
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
    left_s: tuple[float, ...] = ()
    """Of each record, how many seconds the peer will still hold it, as it says; at most the record's own time to live."""
    cursor: bytes = b""
    """For the same peer, to be told only what is newer the next time; empty from one that knows none."""
    lacks: tuple[int, ...] = ()
    """Places of those fingerprints among the ones it was asked with that the peer has no record for."""
    later_s: float = 0.0
    """After how many seconds to ask the peer again, which has more to send than it can now; 0 where it told all it has."""


@dataclass(frozen=True, slots=True)
class LookupReport:
    """What a lookup took. ``hops`` is how far down the chain of answers the closest node was: 1 for one that was known at the start."""

    took_s: float
    requests: int
    failures: int
    hops: int


def patience_of(waited_s: Sequence[float]) -> float:
    """How long a request may hold others up, after answers that took ``waited_s``."""
    if len(waited_s) < limits.PATIENCE_SAMPLES:
        return limits.PATIENCE_S
    return min(limits.PATIENCE_MAX_S, max(limits.PATIENCE_MIN_S, limits.PATIENCE_TIMES_MEDIAN * median(waited_s)))


def later_after(later_s: float, times: int) -> float:
    """How long to wait for a holder that says ``later_s``, having said so ``times`` times before, without telling anything in between."""
    return min(later_s * (1 << min(times, 2)), limits.LATER_MAX_S)


class LookupProtocol(Protocol):
    """What a lookup asks with; None for no answer."""

    async def call_find_node(self, contact: Contact, target: Node) -> Found | None: ...
    async def call_find_value(self, contact: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None: ...


@dataclass(slots=True)
class _Asked:
    contact: Contact
    at: float


class NodeLookup(SpiderCrawl):
    """Finds the k nodes closest to a target."""

    def __init__(
        self, protocol: LookupProtocol, target: Node, contacts: Sequence[Contact], ksize: int, own_id: bytes,
        requests_max: int = limits.LOOKUP_RPCS_MAX, at_once: int = limits.ALPHA, wanted: int | None = None,
    ) -> None:  # fmt: skip
        """``wanted``: how many of the closest must have answered, and are asked; all ``ksize`` of them without it."""
        super().__init__(protocol, target, [], ksize, at_once)
        self.nearest: CandidateHeap = CandidateHeap(target, ksize)
        self.nearest.push(list(contacts))
        self.answered: dict[bytes, Contact] = {}
        self.seen: dict[bytes, Contact] = {contact.id: contact for contact in contacts}
        """Whom we started from or were told of; bounded by the requests and k."""
        self.requests = 0
        self.report = LookupReport(0.0, 0, 0, 0)
        self._requests_max = requests_max
        self._closest_wanted = ksize if wanted is None else wanted
        self._own_id = own_id
        self._failed: dict[bytes, None] = {}
        self._hops: dict[bytes, int] = dict.fromkeys(self.seen, 1)
        self._waited_s: list[float] = []
        self._late: dict[bytes, None] = {}
        self._busy: dict[bytes, int] = {}
        """Who said to ask later, and how many times."""

    def begin_with(self, contact: Contact, found: Found) -> None:
        """What a contact answered before the lookup began: it isn't asked again."""
        self.nearest.push(contact)
        self.nearest.mark_contacted(contact)
        self.seen.setdefault(contact.id, contact)
        self._hops.setdefault(contact.id, 1)
        self._heard(contact, found)

    async def find(self) -> list[Contact]:
        """Those of the k closest that answered, the closest first. Cancel-safe."""
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(limits.LOOKUP_S):
                await self._crawl()
        except TimeoutError:
            pass  # what was found so far is the answer
        closest = [contact for contact in self._closest() if contact.id in self.answered]
        took_s = asyncio.get_running_loop().time() - started
        hops = self._hops[closest[0].id] if closest else 0
        self.report = LookupReport(took_s, self.requests, len(self._failed) + len(self._late), hops)
        return closest

    async def _crawl(self) -> None:
        running: dict[asyncio.Task[Found | None], _Asked] = {}
        now = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as tasks:
            try:
                while True:
                    next_late = self._pass_over(list(running.values()), now())
                    if self._is_complete(list(running.values()), now()):
                        return
                    for contact in self._to_ask(len(running) - len(self._late)):
                        self.requests += 1
                        self.nearest.mark_contacted(contact)
                        running[tasks.create_task(self._ask(contact), name="dht lookup")] = _Asked(contact, now())
                        next_late = min(next_late, self.patience_s)
                    if not running:
                        return
                    done, _ = await asyncio.wait(running, timeout=next_late, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in running if task in done]:
                        asked, found = running.pop(task), task.result()
                        if found is not None and found.later_s:
                            again = self._ask_again(asked.contact, found)
                            running[tasks.create_task(again, name="dht lookup")] = asked
                            continue
                        if asked.contact.id not in self._busy:
                            self._waited_s.append(now() - asked.at)
                        self._heard(asked.contact, found)
            finally:
                for task in running:
                    task.cancel()

    def passed_over(self) -> list[Contact]:
        """Those that kept the lookup waiting to its end, and said nothing."""
        return [node for node in self.nearest.by_distance() if node.id in self._late and node.id not in self._busy]

    def named(self) -> list[Contact]:
        """Who came up near the target and didn't fail, the nearest first; bounded by `CANDIDATES_MAX`."""
        return list(self.nearest.by_distance())

    def failed(self) -> list[bytes]:
        """Ids of those that didn't answer; bounded by the requests."""
        return list(self._failed)

    @property
    def patience_s(self) -> float:
        """How long a request may hold up the lookup."""
        return patience_of(self._waited_s)

    def _pass_over(self, running: Sequence[_Asked], now: float) -> float:
        """Note whose time is over; returns after how many seconds there may be more of them."""
        patience_s = self.patience_s
        left = [asked.at + patience_s - now for asked in running]
        late = [asked for asked, left_s in zip(running, left, strict=True) if left_s <= 0 or self._is_busy(asked)]
        self._late = {asked.contact.id: None for asked in late}
        waits = [left_s for left_s in left if left_s > 0]
        waits += [left_s + patience_s for left_s in left if -patience_s < left_s <= 0]
        busy = [asked.at + limits.LATER_WAITED_S - now for asked in late if self._is_busy(asked)]
        waits += [wait_s for wait_s in busy if wait_s > 0]
        return max(min(waits), 0.001) if waits else limits.LOOKUP_S

    def _is_busy(self, asked: _Asked) -> bool:
        return asked.contact.id in self._busy

    def _closest(self) -> list[Contact]:
        """The k closest, without those that keep us waiting."""
        if not self._late:
            return list(self.nearest)
        return [node for node in self.nearest.by_distance() if node.id not in self._late][: self.ksize]

    def _to_ask(self, in_flight: int) -> list[Contact]:
        room = min(self.alpha - in_flight, self._requests_max - self.requests)
        among = self._closest()[: self._closest_wanted]
        waiting = [node for node in among if node.id not in self.nearest.contacted]
        return waiting[: max(room, 0)]

    def _ask(self, contact: Contact) -> Coroutine[Any, Any, Found | None]:
        found: Coroutine[Any, Any, Found | None] = self.protocol.call_find_node(contact, self.node)
        return found

    def _ask_again(self, contact: Contact, found: Found) -> Coroutine[Any, Any, Found | None]:
        """Who says to ask later names others at once; meanwhile others are asked, as in place of any who is slow."""
        times = self._busy.get(contact.id, 0)
        self._busy[contact.id] = times + 1
        self._told_of(contact, found.contacts)
        return self._ask_later(contact, later_after(found.later_s, times))

    async def _ask_later(self, contact: Contact, later_s: float) -> Found | None:
        await asyncio.sleep(later_s)
        return await self._ask(contact)

    def _heard(self, contact: Contact, found: Found | None) -> None:
        if found is None:
            self._failed[contact.id] = None
            self.nearest.remove([contact.id])
            return
        self.answered[contact.id] = contact
        self._told_of(contact, found.contacts)

    def _told_of(self, contact: Contact, contacts: Sequence[Contact]) -> None:
        new = [node for node in contacts if node.id != self._own_id and node.id not in self._failed]
        self.nearest.push(new)
        for node in new:
            if node.id not in self.seen:
                self.seen[node.id] = node
                self._hops[node.id] = self._hops[contact.id] + 1

    def _wanted(self) -> int:
        """How many of the closest must have answered."""
        return self._closest_wanted

    def _is_complete(self, running: Sequence[_Asked], now: float) -> bool:
        """All that are wanted answered; where there are fewer, the late ones are waited for twice as long as the others."""
        closest = self._closest()[: self._wanted()]
        if any(node.id not in self.answered for node in closest):
            return False
        if not self._late or len(closest) >= self._wanted():
            return True
        overdue = now - 2 * self.patience_s
        return bool(closest) and all(asked.at <= overdue for asked in running if asked.contact.id in self._late)


class ValueLookup(NodeLookup):
    """Gathers a key's records from a quorum of the closest nodes, merged by (publisher, subkey)."""

    def __init__(
        self, protocol: LookupProtocol, key: bytes, target: Node, contacts: Sequence[Contact], ksize: int, own_id: bytes
    ) -> None:
        super().__init__(protocol, target, contacts, ksize, own_id)
        self.key = key
        self.merged: dict[RecordName, Record] = {}
        self._held: dict[bytes, dict[RecordName, int]] = {}
        self._cursors: dict[bytes, bytes] = {}
        """Of those that told a part and said to ask later."""

    def _ask(self, contact: Contact) -> Coroutine[Any, Any, Found | None]:
        since = self._cursors.get(contact.id, b"")
        found: Coroutine[Any, Any, Found | None] = self.protocol.call_find_value(contact, self.key, self.node, since)
        return found

    def _ask_again(self, contact: Contact, found: Found) -> Coroutine[Any, Any, Found | None]:
        """What it told before it said later counts, and isn't asked for again."""
        self._told(contact, found)
        if found.cursor:
            self._cursors[contact.id] = found.cursor
        return super()._ask_again(contact, found)

    def _is_complete(self, running: Sequence[_Asked], now: float) -> bool:
        """While nobody knew anything, those that said later are waited for."""
        since = now - limits.LATER_WAITED_S
        if not self.merged and any(self._is_busy(asked) and asked.at > since for asked in running):
            return False
        return super()._is_complete(running, now)

    def _heard(self, contact: Contact, found: Found | None) -> None:
        super()._heard(contact, found)
        if found is not None:
            self._told(contact, found)

    def _told(self, contact: Contact, found: Found) -> None:
        merge(self.merged, found.records)
        self._held.setdefault(contact.id, {}).update({record.name: record.sequence for record in found.records})

    def _wanted(self) -> int:
        """Half of the k closest, but all of them before a key is said to have no records: the first ten may know only each other."""
        return max(1, int(self.ksize) // 2) if self.merged else int(self.ksize)

    def corrections(self) -> list[tuple[Contact, list[Record]]]:
        """For the closest holders that answered with less than is known: what they lack."""
        found = []
        for contact in self.nearest:
            held = self._held.get(contact.id)
            if held is None or contact.id not in self.answered:
                continue
            lacking = [record for name, record in self.merged.items() if held.get(name, -1) < record.sequence]
            if lacking:
                found.append((contact, lacking[: limits.CORRECTED_RECORDS_MAX]))
            if len(found) >= limits.CORRECTED_HOLDERS_MAX:
                break
        return found
