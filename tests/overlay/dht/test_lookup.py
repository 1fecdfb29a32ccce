"""Lookups among nodes that answer late or never, in virtual time: nobody is waited for who isn't needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from kademlia.node import Node

from netsim.loop import run
from overlay.dht import limits
from overlay.dht.lookup import Found, NodeLookup, ValueLookup
from overlay.dht.records import seal_record
from overlay.dht.table import Contact
from tests.overlay.network import identity

TARGET = Contact(identity(5000).peer_id)
KEY = b"k" * 32
ANSWER_S = 0.1
RPC_S = limits.RPC_DIAL_TIMEOUT_S


class Crowd:
    """Nodes that know each other; the dead ones say nothing until the call is given up."""

    def __init__(self, count: int, dead_every: int = 0, slow_s: float = ANSWER_S) -> None:
        self.contacts = [Contact(identity(number).peer_id) for number in range(1, count + 1)]
        self.contacts.sort(key=TARGET.distance_to)
        self.dead = {contact.id: None for contact in (self.contacts[::dead_every] if dead_every else ())}
        self._slow_s = slow_s

    async def call_find_node(self, contact: Contact, target: Node) -> Found | None:
        if contact.id in self.dead:
            await asyncio.sleep(RPC_S)
            return None
        await asyncio.sleep(self._slow_s)
        return Found(tuple(self.contacts[: limits.KSIZE]))

    async def call_find_value(self, contact: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None:
        raise AssertionError("nobody looks for values here")


class Clique(Crowd):
    """The nearest twenty hold a record; of the others the nearest ``closed`` know only each other, and the rest know all."""

    def __init__(self, closed: int) -> None:
        super().__init__(limits.KSIZE + closed + 10)
        self.holders = {contact.id: None for contact in self.contacts[: limits.KSIZE]}
        self.closed = self.contacts[limits.KSIZE :][:closed]
        self.record = seal_record(identity(1), KEY, b"a", 1, 60, b"held")

    async def call_find_value(self, contact: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None:
        await asyncio.sleep(ANSWER_S)
        if contact in self.closed:
            return Found(tuple(self.closed[: limits.KSIZE]))
        return Found(tuple(self.contacts[: limits.KSIZE]), (self.record,) if contact.id in self.holders else ())


def valued(clique: Clique) -> ValueLookup:
    async def main() -> ValueLookup:
        start = clique.contacts[limits.KSIZE :][: limits.KSIZE]
        lookup = ValueLookup(clique, KEY, TARGET, start, limits.KSIZE, b"own")
        await lookup.find()
        return lookup

    return run(main())


class BusyCrowd(Crowd):
    """All know all and the first ``holding`` hold a record, but who is among ``busy`` says so often to be asked ``later_s`` later."""

    def __init__(self, count: int, busy: dict[int, int], later_s: float, *, holding: int) -> None:
        super().__init__(count)
        self.busy = [self.contacts[place] for place in busy]
        self.record = seal_record(identity(1), KEY, b"a", 1, 60, b"held")
        self.asked: list[tuple[Contact, float]] = []
        self._holders = self.contacts[:holding]
        self._left = {self.contacts[place].id: times for place, times in busy.items()}
        self._later_s = later_s

    async def call_find_value(self, contact: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None:
        self.asked.append((contact, asyncio.get_running_loop().time()))
        if contact.id in self.dead:
            await asyncio.sleep(RPC_S)
            return None
        await asyncio.sleep(ANSWER_S)
        near = tuple(self.contacts[: limits.KSIZE])
        if self._left.get(contact.id, 0):
            self._left[contact.id] -= 1
            return Found(near, later_s=self._later_s)
        return Found(near, (self.record,) if contact in self._holders else ())

    def looked_up(self, start: list[Contact]) -> ValueLookup:
        async def main() -> ValueLookup:
            lookup = ValueLookup(self, KEY, TARGET, start, limits.KSIZE, b"own")
            await lookup.find()
            return lookup

        return run(main())

    def asked_at(self, contact: Contact) -> list[float]:
        """In seconds after the first question to anybody."""
        return [at - self.asked[0][1] for asked, at in self.asked if asked is contact]


def looked(
    crowd: Crowd, start: int = 3, requests_max: int = limits.LOOKUP_RPCS_MAX, at_once: int = limits.ALPHA
) -> tuple[NodeLookup, list[Contact]]:
    async def main() -> tuple[NodeLookup, list[Contact]]:
        lookup = NodeLookup(crowd, TARGET, crowd.contacts[-start:], limits.KSIZE, b"own", requests_max, at_once)
        return lookup, await lookup.find()

    return run(main())


def test_the_closest_are_found_from_the_farthest() -> None:
    crowd = Crowd(60)
    lookup, found = looked(crowd)
    assert found == crowd.contacts[: limits.KSIZE]
    assert lookup.report.hops == 2
    assert lookup.passed_over() == []


def test_dead_nodes_among_the_closest_cost_patience_and_not_their_timeouts() -> None:
    crowd = Crowd(60, dead_every=5)
    lookup, found = looked(crowd, start=30)
    assert [contact.id for contact in found if contact.id in crowd.dead] == []
    assert len(found) == limits.KSIZE
    assert lookup.report.took_s < RPC_S
    assert 0 < len(lookup.passed_over()) <= len(crowd.dead)


def test_in_a_network_of_few_the_silent_are_waited_for_but_not_to_the_end() -> None:
    crowd = Crowd(5, dead_every=4)
    lookup, found = looked(crowd, start=5)
    assert len(found) == 3
    assert limits.PATIENCE_MIN_S < lookup.report.took_s <= 2 * limits.PATIENCE_MAX_S


def test_where_everybody_is_slow_nobody_is_taken_for_dead() -> None:
    crowd = Crowd(30, slow_s=1.8)
    _, found = looked(crowd)
    nearest = {contact.id: None for contact in crowd.contacts[: limits.KSIZE]}
    assert len(found) == limits.KSIZE
    assert sum(contact.id in nearest for contact in found) >= limits.KSIZE * 3 // 4


def test_a_look_with_few_requests_asks_no_more() -> None:
    lookup, _ = looked(Crowd(60), requests_max=3)
    assert lookup.requests == 3


def test_a_look_with_few_requests_one_after_the_other_asks_those_that_the_first_told_of() -> None:
    crowd = Crowd(60)
    lookup, _ = looked(crowd, requests_max=3, at_once=1)
    assert list(lookup.answered) == [contact.id for contact in (crowd.contacts[-3], *crowd.contacts[:2])]


def test_a_key_is_not_absent_because_ten_who_know_only_each_other_hold_nothing() -> None:
    lookup = valued(Clique(closed=15))
    assert [record.value for record in lookup.merged.values()] == [b"held"]


def test_a_key_whose_records_were_found_is_not_looked_for_at_all_of_the_closest() -> None:
    lookup = valued(Clique(closed=0))
    nearest = [contact.id for contact in lookup.nearest]
    assert lookup.merged
    assert limits.KSIZE // 2 <= sum(asked in lookup.answered for asked in nearest) < limits.KSIZE


def test_a_look_for_fewer_than_k_asks_the_nearest_alone_and_those_on_the_way() -> None:
    async def main() -> NodeLookup:
        crowd = Crowd(60)
        lookup = NodeLookup(crowd, TARGET, crowd.contacts[-3:], limits.KSIZE, b"own", wanted=7)
        assert (await lookup.find())[:7] == crowd.contacts[:7]
        return lookup

    assert run(main()).requests == 7 + 3


def test_who_says_later_is_asked_again_after_that_time_and_its_records_count() -> None:
    crowd = BusyCrowd(1, {0: 2}, 0.6, holding=1)
    (busy,) = crowd.busy
    lookup = crowd.looked_up([busy])
    assert crowd.asked_at(busy) == pytest.approx([0.0, ANSWER_S + 0.6, 2 * ANSWER_S + 0.6 + 1.2])
    assert [record.value for record in lookup.merged.values()] == [b"held"]
    assert list(lookup.answered) == [busy.id]
    assert lookup.requests == 1


def test_whom_one_names_that_says_later_are_asked_before_it_is_asked_again() -> None:
    crowd = BusyCrowd(6, {5: 1}, limits.LATER_MAX_S, holding=3)
    crowd.looked_up(crowd.busy)
    assert [contact for contact, _ in crowd.asked[:5]] == [*crowd.busy, *crowd.contacts[:4]]


def test_whom_one_names_that_says_later_are_asked_at_once() -> None:
    crowd = BusyCrowd(6, {5: 1}, limits.LATER_MAX_S, holding=3)
    crowd.looked_up(crowd.busy)
    assert [crowd.asked_at(contact) for contact in crowd.contacts[:4]] == [pytest.approx([ANSWER_S])] * 4


def test_among_many_nobody_who_says_later_is_waited_for_nor_passed_over_as_one_who_is_silent() -> None:
    crowd = BusyCrowd(40, {0: 99, 3: 99}, limits.LATER_MIN_S, holding=20)
    crowd.dead[crowd.contacts[1].id] = None
    lookup = crowd.looked_up(crowd.contacts[-3:])
    assert lookup.merged
    assert lookup.report.took_s < RPC_S
    assert [contact for contact in crowd.busy if contact.id in lookup.answered] == []
    assert lookup.passed_over() == [crowd.contacts[1]]


def test_how_long_one_who_says_later_took_makes_nobody_patient() -> None:
    crowd = BusyCrowd(8, dict.fromkeys(range(5), 1), 0.5, holding=0)
    lookup = crowd.looked_up(crowd.contacts)
    assert all(contact.id in lookup.answered for contact in crowd.busy)
    assert lookup.patience_s == pytest.approx(limits.PATIENCE_TIMES_MEDIAN * ANSWER_S)


def test_a_crowd_that_says_later_for_ever_ends_a_look_with_nothing_and_in_time() -> None:
    crowd = BusyCrowd(limits.KSIZE, dict.fromkeys(range(limits.KSIZE), 10**6), limits.LATER_MIN_S, holding=limits.KSIZE)
    lookup = crowd.looked_up(crowd.contacts)
    assert lookup.merged == {}
    assert lookup.report.took_s <= limits.LOOKUP_S
    assert lookup.passed_over() == []


def test_in_place_of_those_that_say_later_others_are_asked_at_once() -> None:
    crowd = BusyCrowd(40, dict.fromkeys(range(limits.ALPHA), 99), limits.LATER_MAX_S, holding=40)
    crowd.looked_up(crowd.contacts[: limits.KSIZE])
    assert crowd.asked_at(crowd.contacts[limits.ALPHA]) == [pytest.approx(ANSWER_S)]


def test_those_that_said_later_and_no_more_are_not_told_what_they_lack() -> None:
    crowd = BusyCrowd(40, {0: 99, 3: 99}, limits.LATER_MAX_S, holding=40)
    assert crowd.looked_up(crowd.contacts[: limits.KSIZE]).corrections() == []


def test_an_empty_key_is_not_looked_for_longer_because_somebody_says_later_for_ever() -> None:
    crowd = BusyCrowd(limits.KSIZE, {0: 99}, limits.LATER_MAX_S, holding=0)
    lookup = crowd.looked_up(crowd.contacts)
    assert lookup.merged == {}
    assert lookup.report.took_s == pytest.approx(limits.LATER_WAITED_S, abs=0.01)


def test_what_one_told_before_it_said_later_counts_and_is_not_asked_for_again() -> None:
    class PagedCrowd(BusyCrowd):
        async def call_find_value(self, contact: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None:
            found = await super().call_find_value(contact, key, target, since)
            assert found is not None
            if found.later_s:
                return replace(found, records=(self.record,), left_s=(60.0,), cursor=b"after the first")
            return replace(found, records=() if since == b"after the first" else found.records)

    crowd = PagedCrowd(1, {0: 1}, limits.LATER_MIN_S, holding=1)
    lookup = crowd.looked_up(crowd.busy)
    assert [record.value for record in lookup.merged.values()] == [b"held"]
    assert lookup.corrections() == []


def test_a_key_is_not_absent_because_the_only_one_who_holds_its_record_says_later() -> None:
    crowd = BusyCrowd(limits.KSIZE // 2, {0: 1}, limits.LATER_MAX_S, holding=1)
    lookup = crowd.looked_up(crowd.contacts)
    assert [record.value for record in lookup.merged.values()] == [b"held"]
