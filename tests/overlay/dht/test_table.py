"""The routing table: exact neighbours, bounded groups, and who is asked when a bucket is full."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter

import pytest
from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.lookup import Found, NodeLookup
from overlay.dht.table import Contact, Table, group_of, node_id_of
from overlay.multiaddr import Multiaddr
from tests.overlay.network import identity


def contact(number: int, group: str = "") -> Contact:
    return Contact(identity(number).peer_id, (), group)


def filled(count: int) -> Table:
    table = Table(contact(1))
    for number in range(2, count + 2):
        table.add_contact(contact(number))
    return table


@pytest.mark.parametrize("target", range(1000, 1010))
def test_neighbours_are_the_exact_closest_of_all_that_are_known(target: int) -> None:
    table = filled(300)
    wanted = Node(node_id_of(identity(target).peer_id))
    everyone = table.contacts()
    assert table.find_neighbors(wanted, 20) == heapq.nsmallest(20, everyone, key=wanted.distance_to)
    excluded = everyone[0]
    assert excluded not in table.find_neighbors(wanted, 500, exclude=excluded)
    assert len(table.find_neighbors(wanted, 500, exclude=excluded)) == len(everyone) - 1


def test_our_own_neighbourhood_is_kept_in_full() -> None:
    table = filled(400)
    own = table.node
    nearest = heapq.nsmallest(10, (contact(n) for n in range(2, 402)), key=own.distance_to)
    assert {found.id for found in nearest} <= {found.id for found in table.contacts()}


def test_contacts_are_counted_by_how_many_bits_they_share_with_us() -> None:
    table = filled(300)
    shared = [limits.ID_BITS - (found.long_id ^ table.node.long_id).bit_length() for found in table.contacts()]
    assert [table.count_at(depth) for depth in range(20)] == [shared.count(depth) for depth in range(20)]
    assert table.own_depth < max(shared)
    assert [table.depth_of(found.id) for found in table.contacts()] == shared


def test_ourselves_never_enter_and_a_full_bucket_names_whom_to_ask() -> None:
    table = filled(600)
    assert table.add_contact(contact(1)) is None
    assert table.get(contact(1).id) is None
    asked = [found for number in range(700, 760) if (found := table.add_contact(contact(number))) is not None]
    assert asked
    assert all(table.get(found.id) is not None for found in asked)


def test_one_address_group_gets_few_places() -> None:
    table = Table(contact(1))
    for number in range(2, 60):
        table.add_contact(contact(number, "198.51.100.0/24"))
    assert len(table.contacts()) <= limits.CONTACTS_PER_GROUP
    for number in range(60, 100):
        table.add_contact(contact(number, ""))
    assert len(table.contacts()) > limits.CONTACTS_PER_GROUP


def counted(table: Table) -> Counter[str]:
    return Counter(found.group for found in table.contacts() if found.group)


def naively_diverse(table: Table, node: Contact) -> bool:
    """By counting everybody, every time."""
    own = table.buckets[table.get_bucket_for(node)]
    in_bucket = sum(other.group == node.group for other in own.nodes.values())
    in_table = sum(other.group == node.group for other in table.contacts())
    return in_bucket < limits.CONTACTS_PER_GROUP_AND_BUCKET and in_table < limits.CONTACTS_PER_GROUP


@pytest.mark.parametrize("seed", range(5))
def test_places_of_a_group_are_counted_right_whoever_comes_moves_and_goes(seed: int) -> None:
    draws = random.Random(seed)
    table = Table(contact(1), 4)
    refused = moved = 0
    for _ in range(1500):
        node = contact(draws.randrange(2, 400), f"net {draws.randrange(12)}" if draws.random() < 0.95 else "")
        known = table.get(node.id)
        if known is not None:
            if draws.random() < 0.6:
                table.remove_contact(node)
            else:
                assert table.add_contact(node) is None
                assert table.get(node.id) is node  # who is there stays, wherever it is now
                moved += known.group != node.group
            assert table._groups == counted(table)
            continue
        if not node.group:
            table.add_contact(node)
            continue
        is_welcome = naively_diverse(table, node)
        asked = table.add_contact(node)
        is_there = table.get(node.id) is not None or asked is not None
        assert is_there == is_welcome
        refused += not is_there
        assert table._groups == counted(table)
    assert refused > 100
    assert moved > 20


@pytest.mark.parametrize("leaves", ["one by one", "after a split"])
def test_those_who_wait_for_a_place_come_in_only_where_their_group_has_room(leaves: str) -> None:
    """Seen by a reviewer: 60 of one group that waited took all of a bucket's 20 places as the others left."""
    table = Table(contact(1))
    far = [found for found in map(contact, range(2, 400)) if table.depth_of(found.id) == 0]
    honest, crowd = far[:20], [contact(n, "198.51.100.0/24") for n in range(400, 700)]
    for found in honest:
        table.add_contact(found)
    for found in crowd:
        bucket = table.buckets[table.get_bucket_for(found)]
        bucket.replacement_nodes[found.id] = found
    if leaves == "after a split":
        table.split_bucket(0)
    for found in honest:
        table.remove_contact(found)
        assert table._groups == counted(table)
    assert all(Counter(n.group for n in bucket.nodes.values()).total() <= 2 for bucket in table.buckets)
    assert 2 <= len(table) <= limits.CONTACTS_PER_GROUP


def test_groups_are_networks_and_private_ones_can_be_exempt() -> None:
    public = Multiaddr.parse("/ip4/8.8.4.4/tcp/1")
    assert group_of(public, exempt_private=True) == "8.8.4.0/24"
    assert group_of(Multiaddr.parse("/ip6/2600:1:2:3::4/tcp/1"), exempt_private=True) == "2600:1:2::/48"
    private = Multiaddr.parse("/ip4/10.1.2.3/tcp/1")
    assert group_of(private, exempt_private=True) == ""
    assert group_of(private, exempt_private=False) == "10.1.2.0/24"


class Crowd:
    """A network of tables in memory; ``answer`` may lie."""

    def __init__(self, count: int) -> None:
        self.members = [contact(number) for number in range(1, count + 1)]
        self.calls = 0

    async def call_find_node(self, asked: Contact, target: Node) -> Found | None:
        self.calls += 1
        await asyncio.sleep(0)
        return Found(tuple(heapq.nsmallest(20, self.members, key=target.distance_to)))

    async def call_find_value(self, asked: Contact, key: bytes, target: Node, since: bytes = b"") -> Found | None:
        return await self.call_find_node(asked, target)


class Dead(Crowd):
    async def call_find_node(self, asked: Contact, target: Node) -> Found | None:
        self.calls += 1
        return None


class EverNearer(Crowd):
    """Always names new nodes, each nearer than the last: without bounds there is no end."""

    async def call_find_node(self, asked: Contact, target: Node) -> Found | None:
        self.calls += 1
        await asyncio.sleep(0)
        return Found(tuple(contact(10_000 + 20 * self.calls + index) for index in range(20)))


def crawl(crowd: Crowd) -> tuple[list[Contact], Node]:
    target = Node(node_id_of(identity(5000).peer_id))

    async def main() -> list[Contact]:
        return await NodeLookup(crowd, target, crowd.members[:3], 20, contact(9999).id).find()

    return asyncio.run(main()), target


def test_a_lookup_finds_the_closest_of_all() -> None:
    crowd = Crowd(200)
    found, target = crawl(crowd)
    assert found == heapq.nsmallest(20, crowd.members, key=target.distance_to)


def test_a_lookup_among_the_dead_ends_with_nobody() -> None:
    assert crawl(Dead(10))[0] == []


def test_a_lookup_that_is_led_on_ends_at_its_bound() -> None:
    crowd = EverNearer(10)
    crawl(crowd)
    assert crowd.calls <= limits.LOOKUP_RPCS_MAX
