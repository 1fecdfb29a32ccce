"""Our records at their holders: who is new near a key gets them, and the newest value goes out whatever was under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.node import Dht
from overlay.dht.protocol import DhtProtocol, Stored
from overlay.dht.records import Record, location_of
from overlay.dht.store import Put, RecordStore
from overlay.dht.table import Contact, node_id_of
from overlay.host import Host
from tests.overlay.dht.test_node import KEY, OTHER, run_nodes, values
from tests.overlay.network import until

TTL_S = 60.0


def held_by(node: Dht, key: bytes = KEY) -> list[bytes]:
    return [record.value for record in node.held(key)]


async def look(node: Dht, key: bytes = KEY) -> None:
    """The neighbourhood of a key, looked for now."""
    await node.nearest_to(Node(location_of(key)), limits.KSIZE, fresh_s=0.0)  # type: ignore[no-untyped-call]


class Holders:
    """What holders say to a store, as a test wants it; those without a word here are asked really."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: dict[bytes, Put | None] = {}
        self.gate = asyncio.Event()
        self.gated: dict[bytes, None] = {}
        self.stored: list[tuple[bytes, bytes]] = []
        call_store = DhtProtocol.call_store

        async def noted(
            protocol: DhtProtocol, contact: Contact, records: Sequence[Record], near: Node | None = None
        ) -> Stored | None:
            self.stored += [(contact.id, record.value) for record in records]
            if contact.id in self.gated:
                await self.gate.wait()
            if contact.id in self.said:
                word = self.said[contact.id]
                return None if word is None else Stored(tuple((word, 0) for _ in records), ())
            return await call_store(protocol, contact, records, near)

        monkeypatch.setattr(DhtProtocol, "call_store", noted)


def test_who_is_new_near_a_key_gets_our_record_as_soon_as_it_was_found_there() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher, newcomer = nodes[1], nodes[3]
        await publisher.publish_and_wait(KEY, b"a", b"kept", TTL_S)
        await publisher.publish_and_wait(OTHER, b"a", b"elsewhere", TTL_S)
        entry = publisher._publications.get(KEY, b"a")
        assert entry is not None
        newcomer._store = RecordStore()
        del entry.holders[node_id_of(hosts[3].peer_id)]
        await look(publisher, OTHER)
        await look(publisher)
        await until(lambda: held_by(newcomer) == [b"kept"])
        await until(lambda: node_id_of(hosts[3].peer_id) in entry.holders)
        assert held_by(newcomer, OTHER) == []

    run_nodes(5, scene)


def test_who_follows_a_key_that_it_publishes_under_offers_to_its_new_members_too() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher, newcomer = nodes[1], nodes[3]
        await publisher.publish_and_wait(KEY, b"a", b"kept", TTL_S)
        entry = publisher._publications.get(KEY, b"a")
        assert entry is not None
        newcomer._store = RecordStore()
        del entry.holders[node_id_of(hosts[3].peer_id)]
        publisher._neighbourhoods.located(location_of(KEY), [], 0, [], [], 0.0)
        await publisher.follow(KEY).read()
        await until(lambda: held_by(newcomer) == [b"kept"])

    run_nodes(5, scene)


def test_what_lives_shortly_goes_to_the_nearest_few_and_what_lasts_to_all_that_are_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holders = Holders(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        place = int.from_bytes(location_of(KEY), "big")
        ids = [node_id_of(host.peer_id) for host in hosts[:-1]]
        nearest = sorted(ids, key=lambda id_: int.from_bytes(id_, "big") ^ place)
        await look(nodes[-1])
        for value, ttl_s, copies in (
            (b"short-lived", limits.SHORT_LIVED_S, limits.COPIES_OF_SHORT_LIVED),
            (b"lasting", limits.SHORT_LIVED_S + 1, limits.KSIZE),
        ):
            assert await nodes[-1].publish_and_wait(KEY, value, value, ttl_s) == copies
            assert sorted(to for to, stored in holders.stored if stored == value) == sorted(nearest[:copies])

    run_nodes(limits.KSIZE + 3, scene, clients=1)


def test_a_neighbourhood_that_is_the_same_is_offered_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    holders = Holders(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", TTL_S)
        await nodes[1].publish_and_wait(KEY, b"b", b"abandoned", TTL_S)
        nodes[1].abandon(KEY, b"b")
        entry = nodes[1]._publications.get(KEY, b"b")
        assert entry is not None
        entry.holders.clear()
        holders.stored.clear()
        await look(nodes[1])
        await asyncio.gather(*nodes[1]._running.values())
        assert holders.stored == []

    run_nodes(4, scene)


def test_renewals_go_to_the_holders_without_a_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher = nodes[-1]
        await publisher.publish_and_wait(KEY, b"a", b"one", TTL_S)
        before = publisher.statistics().calls
        assert await publisher.publish_and_wait(KEY, b"a", b"two", TTL_S) == 4
        assert publisher.statistics().calls - before == 4
        assert [held_by(node) for node in nodes[:4]] == [[b"two"]] * 4

    run_nodes(5, scene, clients=1)


def test_who_reads_a_key_that_it_publishes_under_looks_for_as_many_nodes_as_it_offers_to() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher = nodes[-1]
        await publisher.publish_and_wait(KEY, b"a", b"one", TTL_S)
        await publisher.nearest_to(Node(location_of(KEY)), 1, fresh_s=0.0)  # type: ignore[no-untyped-call]
        before = publisher.statistics().calls
        assert await publisher.publish_and_wait(KEY, b"a", b"two", TTL_S) == 7
        assert publisher.statistics().calls - before == 7

    run_nodes(8, scene, clients=1)


def test_a_holder_that_does_not_answer_makes_the_neighbourhood_be_looked_for_before_the_next_offer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holders = Holders(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher, now, place = nodes[1], hosts[1].ports.clock.now, location_of(KEY)
        await publisher.publish_and_wait(KEY, b"a", b"kept", TTL_S)
        assert publisher._neighbourhoods.members(place, 1, now() + limits.RELOCATE_S)
        silent = node_id_of(hosts[2].peer_id)
        holders.said[silent] = None
        assert await publisher.publish_and_wait(KEY, b"a", b"new", TTL_S) == 3
        members = publisher._neighbourhoods.members(place, 1, now())
        assert silent not in [contact.id for contact in members]
        assert not publisher._neighbourhoods.members(place, 1, now() + limits.RELOCATE_S)

    run_nodes(5, scene)


@pytest.mark.parametrize(
    ("said", "after_s"),
    [
        ([Put.FULL] * 3, TTL_S / 2),
        ([None] * 3, limits.REPUBLISH_RETRY_S),
        ([Put.FULL, None, None], TTL_S / 2),
        ([Put.FULL, Put.RATE, Put.FULL], limits.REPUBLISH_RETRY_S),
        ([Put.FULL, Put.STORED, None], TTL_S / 2),
    ],
    ids=["full", "silent", "full or silent", "too often for one", "stored by one"],
)
def test_a_full_key_is_tried_again_at_half_life_and_one_that_nobody_answers_for_soon(
    monkeypatch: pytest.MonkeyPatch, said: list[Put | None], after_s: float
) -> None:
    holders = Holders(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        for host, word in zip(hosts, said, strict=False):
            holders.said[node_id_of(host.peer_id)] = word
        publisher = nodes[-1]
        before = hosts[-1].ports.clock.now()
        await publisher.publish_and_wait(KEY, b"a", b"x", TTL_S)
        entry = publisher._publications.get(KEY, b"a")
        assert entry is not None
        assert entry.due - before == pytest.approx(after_s, abs=1.0)

    run_nodes(4, scene, clients=1)


def test_a_value_that_is_set_while_a_new_member_gets_the_former_one_goes_out_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holders = Holders(monkeypatch)
    monkeypatch.setattr(limits, "UPKEEP_S", 0.02)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher = nodes[-1]
        await publisher.publish_and_wait(KEY, b"a", b"former", TTL_S)
        await until(lambda: not publisher._wake.is_set())  # nothing is due for half a minute
        entry = publisher._publications.get(KEY, b"a")
        assert entry is not None
        entry.holders.clear()
        holders.gated = {node_id_of(host.peer_id): None for host in hosts[:3]}
        holders.stored.clear()
        await look(publisher)
        await until(lambda: len(holders.stored) == 1)
        publisher.publish(KEY, b"a", b"latter", TTL_S)
        holders.gate.set()
        await until(lambda: [held_by(node) for node in nodes[:3]] == [[b"latter"]] * 3)
        assert [value for _, value in holders.stored].count(b"former") == 1, "what is replaced is offered no more"

    run_nodes(4, scene, clients=1)


def test_what_is_abandoned_stays_readable_to_its_end_and_a_withdrawal_takes_it_back_at_once() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"left alone", TTL_S)
        nodes[1].abandon(KEY, b"a")
        calls = nodes[1].statistics().calls
        nodes[1].upkeep(hosts[1].ports.clock.now() + TTL_S / 2 + 1)
        assert nodes[1].statistics().calls == calls
        assert await values(nodes[3]) == [b"left alone"]
        await nodes[1].withdraw(KEY, b"a")
        assert await values(nodes[3]) == []
        await nodes[1].publish_and_wait(OTHER, b"a", b"left alone", TTL_S)
        nodes[1].abandon(OTHER, b"a")
        nodes[1].upkeep(hosts[1].ports.clock.now() + TTL_S + 1)
        assert nodes[1]._publications.get(OTHER, b"a") is None

    run_nodes(4, scene)


def test_an_offer_whose_answers_name_strangers_reaches_them_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELOCATE_S", 0.0)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        publisher, stranger = nodes[1], hosts[3].peer_id
        place = location_of(KEY)
        await look(publisher)
        members = publisher._neighbourhoods.members(place, limits.KSIZE, publisher._now())
        known = [contact for contact in members if contact.peer != stranger]
        assert len(known) == len(members) - 1
        publisher._neighbourhoods.located(place, known, limits.KSIZE, known, [], publisher._now())
        await publisher.publish_and_wait(KEY, b"a", b"reached", TTL_S)
        assert held_by(nodes[3]) == [b"reached"]

    run_nodes(4, scene)
