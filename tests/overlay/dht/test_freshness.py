"""What of the id space is due to be looked into, and when."""

from __future__ import annotations

from collections.abc import Sequence

from overlay.dht import limits
from overlay.dht.freshness import NEVER, Freshness, id_in_part
from overlay.dht.table import Contact, Table
from tests.overlay.network import identity

OWN = Contact(identity(1).peer_id)


def contact(number: int) -> Contact:
    return Contact(identity(number).peer_id)


def fresh(contacts: int, ksize: int = limits.KSIZE) -> tuple[Freshness, Table]:
    """Of a node that began at 0 and knows so many."""
    table = Table(OWN, ksize)
    for number in range(2, 2 + contacts):
        table.add_contact(contact(number))
    freshness = Freshness(table)
    freshness.begin(0.0)
    return freshness, table


def looks_at(freshness: Freshness, nearest: Sequence[bytes], now: float) -> float:
    """Looks for its neighbours and finds those; after how long it is due again."""
    freshness.looked_for_self(nearest, now)
    due = now
    while not freshness.take_self(due):
        due += 10.0
    return due - now


def test_a_neighbourhood_that_stays_the_same_is_looked_at_half_as_often_each_time_up_to_a_bound() -> None:
    freshness, _ = fresh(30)
    same = [contact(2).id, contact(3).id]
    waits = [looks_at(freshness, same, 10_000.0 * turn) for turn in range(5)]
    assert waits == [300.0, 600.0, 1200.0, 1800.0, 1800.0]
    assert looks_at(freshness, same[:1], 1e6) == limits.SELF_LOOKUP_S


def test_who_knows_few_looks_for_its_neighbours_often() -> None:
    freshness, _ = fresh(3)
    assert [looks_at(freshness, [contact(2).id], 1000.0 * turn) for turn in range(3)] == [10.0, 10.0, 10.0]


def test_a_contact_that_left_brings_the_look_forward_only_where_few_are_left() -> None:
    freshness, table = fresh(20)
    freshness.looked_for_self([], 0.0)
    assert not freshness.contact_left(1.0)
    table.remove_contact(contact(2))  # type: ignore[no-untyped-call]
    assert freshness.contact_left(1.0)
    assert (freshness.take_self(10.9), freshness.take_self(11.0)) == (False, True)


def test_one_that_is_back_is_a_reason_to_look_at_once() -> None:
    freshness, _ = fresh(30)
    freshness.looked_for_self([], 0.0)
    freshness.look_for_self_at(5.0)
    assert freshness.next_due() == 5.0
    assert freshness.take_self(5.0)


def test_parts_are_looked_into_once_after_joining_with_a_gap_and_then_each_hour() -> None:
    freshness, table = fresh(60, ksize=4)
    depths = range(table.own_depth)
    assert freshness.take_part(limits.REFRESH_GAP_S - 1) is None
    taken: list[int] = []
    at = limits.REFRESH_GAP_S
    for _ in depths:
        part = freshness.take_part(at)
        if part is not None:
            taken.append(part)
            assert freshness.take_part(at) is None
            at += limits.REFRESH_GAP_S
    assert len(depths) >= 3
    assert taken == [depth for depth in depths if table.count_at(depth) < limits.CONTACTS_ENOUGH]
    assert freshness.take_part(limits.REFRESH_S - 1) is None
    assert freshness.take_part(at + limits.REFRESH_S) == 0


def test_every_part_beyond_our_neighbourhood_is_looked_into_whether_it_has_a_bucket_or_not() -> None:
    everybody = sorted((contact(number) for number in range(2, 1002)), key=OWN.distance_to)
    table = Table(OWN)
    for near in everybody[: limits.KSIZE]:  # all that the first lookup asked, and nobody else
        table.add_contact(near)
    freshness = Freshness(table)
    freshness.begin(0.0)
    freshness.looked_for_self([near.id for near in everybody[: limits.KSIZE]], 0.0)
    depth = table.depth_of(everybody[limits.KSIZE - 1].id)
    taken = [freshness.take_part(limits.REFRESH_GAP_S * (turn + 1)) for turn in range(depth)]
    assert table.own_depth < depth
    assert taken == list(range(depth))
    assert [table.count_at(part) for part in taken if part is not None] == [0] * depth


def test_where_nobody_is_known_no_part_is_due() -> None:
    freshness, _ = fresh(0)
    assert freshness.take_part(1e9) is None
    freshness.look_for_self_at(NEVER)
    assert freshness.next_due() == NEVER


def test_an_id_drawn_in_a_part_shares_so_many_bits_with_ours_and_no_more() -> None:
    for depth in (0, 1, 7, 100):
        for drawn in (bytes(32), b"\xff" * 32, OWN.id):
            found = int.from_bytes(id_in_part(OWN.long_id, depth, drawn), "big")
            assert limits.ID_BITS - (found ^ OWN.long_id).bit_length() == depth
