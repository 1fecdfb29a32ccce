"""The nodes around a key as they were found: how long they are remembered, and what makes them be looked for anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from overlay.dht import limits
from overlay.dht.neighbourhoods import Neighbourhoods
from overlay.dht.records import location_of
from overlay.dht.table import Contact
from tests.overlay.network import identity

PLACE = location_of(b"key")
ALL = sorted(
    (Contact(identity(number).peer_id) for number in range(1, 41)),
    key=lambda contact: contact.long_id ^ int.from_bytes(PLACE, "big"),
)
NEAREST, FARTHER = ALL[:20], ALL[20:]
QUARTER = -(-limits.NEAR // limits.CHANGED_SHARE)
"""So many strangers change a neighbourhood: a quarter of those that a member names."""
STRANGERS, SETTLED = ALL[:QUARTER], ALL[QUARTER : QUARTER + 20]
"""Nearer than twenty members, and those."""


def located(members: Sequence[Contact] = NEAREST, wanted: int = 20, now: float = 0.0) -> Neighbourhoods:
    """One neighbourhood, just looked for."""
    found = Neighbourhoods()
    look(found, now, members, wanted)
    return found


def look(found: Neighbourhoods, now: float, members: Sequence[Contact] = NEAREST, wanted: int = 20) -> None:
    found.located(PLACE, members, wanted, members, [], now)


def name(found: Neighbourhoods, contacts: Sequence[Contact]) -> None:
    """Some member, or none, names them."""
    found.named(PLACE, FARTHER[-1], contacts, 0.0)


def is_known(found: Neighbourhoods, now: float, wanted: int = 20, fresh_s: float = limits.LOCATED_S) -> bool:
    return found.members(PLACE, wanted, now, fresh_s) != ()


def test_what_was_never_looked_for_is_unknown() -> None:
    found = Neighbourhoods()
    assert found.members(PLACE, 1, 0.0) == ()
    name(found, NEAREST)
    found.lost(PLACE, NEAREST[0])
    found.changed(PLACE)
    assert len(found) == 0


def test_a_neighbourhood_is_remembered_for_so_long_the_nearest_first() -> None:
    found = located()
    assert found.members(PLACE, 20, limits.LOCATED_S - 0.1) == tuple(NEAREST)
    assert not is_known(found, limits.LOCATED_S)


def test_one_of_fewer_than_were_looked_for_is_remembered_for_less_long() -> None:
    found = located(NEAREST[:19])
    assert is_known(found, limits.LOCATED_LONELY_S - 0.1)
    assert not is_known(found, limits.LOCATED_LONELY_S)


def test_half_of_them_is_not_lonely_where_half_was_looked_for() -> None:
    assert is_known(located(NEAREST[:10], wanted=10), limits.LOCATED_LONELY_S + 1, wanted=10)


def test_who_wants_it_fresher_has_it_looked_for_sooner() -> None:
    found, fresh_s = located(), limits.THOROUGH_S
    assert is_known(found, fresh_s - 0.1, fresh_s=fresh_s)
    assert not is_known(found, fresh_s, fresh_s=fresh_s)
    assert is_known(found, fresh_s)


def test_who_wants_more_than_were_looked_for_has_them_looked_for_and_who_wants_fewer_has_not() -> None:
    found = located(NEAREST[:10], wanted=10)
    assert not is_known(found, 1.0, wanted=11)
    assert is_known(found, 1.0, wanted=10)
    assert is_known(found, 1.0, wanted=4)


def test_how_many_were_looked_for_is_remembered_after_it_has_to_be_looked_for_again() -> None:
    found = located(NEAREST[:10], wanted=10)
    assert not is_known(found, limits.LOCATED_S, wanted=10)
    assert (found.wanted(PLACE), found.wanted(location_of(b"another key"))) == (10, 0)


def test_a_quarter_of_strangers_nearer_than_the_farthest_member_makes_it_be_looked_for_anew_but_not_at_once() -> None:
    found = located(SETTLED)
    name(found, [*FARTHER, *STRANGERS, *SETTLED])
    assert is_known(found, limits.RELOCATE_S - 0.1)
    assert not is_known(found, limits.RELOCATE_S)


def test_fewer_strangers_than_a_quarter_change_nothing_however_often_they_are_named() -> None:
    found = located(SETTLED)
    for _ in range(QUARTER):
        name(found, [*STRANGERS[1:], *SETTLED, *ALL[QUARTER + 20 :]])
    assert is_known(found, limits.LOCATED_S - 0.1)


def test_strangers_are_counted_over_several_answers_each_once() -> None:
    found = located(SETTLED)
    for stranger in STRANGERS[:-1]:
        name(found, [stranger, SETTLED[0]])
        name(found, [STRANGERS[0], stranger])
        assert is_known(found, limits.LOCATED_S - 0.1)
    name(found, STRANGERS[-1:])
    assert is_known(found, limits.RELOCATE_S - 0.1)
    assert not is_known(found, limits.RELOCATE_S)


def test_strangers_are_counted_anew_after_a_look() -> None:
    found = located(SETTLED)
    name(found, STRANGERS[1:])
    look(found, 1.0, SETTLED)
    name(found, STRANGERS[:-1])
    assert is_known(found, limits.LOCATED_S)
    name(found, STRANGERS[-1:])
    assert not is_known(found, limits.LOCATED_S)


@pytest.mark.parametrize("count", [1, limits.CHANGED_SHARE - 1, limits.CHANGED_SHARE])
def test_a_small_lonely_neighbourhood_changes_with_one_stranger_however_far(count: int) -> None:
    found = located(NEAREST[:count])
    name(found, NEAREST[:count])
    assert is_known(found, limits.RELOCATE_S)
    name(found, [FARTHER[-1]])
    assert is_known(found, limits.RELOCATE_S - 0.1)
    assert not is_known(found, limits.RELOCATE_S)


@pytest.mark.parametrize("count", [1, limits.CHANGED_SHARE - 1])
def test_a_small_neighbourhood_that_is_not_lonely_changes_with_one_nearer_stranger(count: int) -> None:
    found = located(NEAREST[1 : count + 1], wanted=count)
    name(found, FARTHER)
    assert is_known(found, limits.RELOCATE_S, wanted=count)
    name(found, NEAREST[:1])
    assert not is_known(found, limits.RELOCATE_S, wanted=count)


def test_two_of_the_five_that_members_name_are_enough_however_many_members_there_are() -> None:
    """Members name no more than those: a share of all of them could never come up. Seen with 268 daemons that began within 20 s."""
    found = located(ALL[2:22])
    for _ in range(3):
        name(found, ALL[: limits.NEAR])
    assert not is_known(found, limits.RELOCATE_S)


def test_a_stranger_that_is_farther_than_all_members_is_no_news() -> None:
    found = located()
    name(found, FARTHER)
    assert is_known(found, limits.LOCATED_S - 0.1)


def test_where_there_were_too_few_a_quarter_of_any_strangers_is_news() -> None:
    found = located(NEAREST[:12])
    name(found, FARTHER[-QUARTER + 1 :])
    assert is_known(found, limits.RELOCATE_S)
    name(found, FARTHER[-QUARTER:])
    assert not is_known(found, limits.RELOCATE_S)


def test_those_that_the_look_saw_and_found_dead_are_no_news() -> None:
    found = Neighbourhoods()
    found.located(PLACE, SETTLED, 20, [], [contact.id for contact in STRANGERS], 0.0)
    name(found, [*STRANGERS, *SETTLED])
    assert is_known(found, limits.LOCATED_S - 0.1)


def test_patience_doubles_while_looking_finds_the_same_up_to_a_bound() -> None:
    found, now, waits = located(NEAREST[1:], wanted=19), 0.0, []
    for _ in range(7):
        found.changed(PLACE)
        wait_s = 1.0
        while is_known(found, now + wait_s, wanted=19):
            wait_s += 1.0
        waits.append(wait_s)
        now += wait_s
        look(found, now, NEAREST[1:], 19)
    assert waits == [min(limits.RELOCATE_S * 2**looks, limits.LOCATED_S) for looks in range(7)]
    assert waits[-2:] == [limits.LOCATED_S] * 2


def test_patience_begins_anew_where_looking_found_another_neighbourhood() -> None:
    found, patience_s = located(), limits.RELOCATE_S
    look(found, patience_s)
    look(found, 3 * patience_s, ALL[1:21])
    found.changed(PLACE)
    assert is_known(found, 4 * patience_s - 0.1)
    assert not is_known(found, 4 * patience_s)


def test_members_that_do_not_answer_leave_and_half_of_them_lost_is_worth_a_look() -> None:
    found = located()
    for contact in NEAREST[:10]:
        found.lost(PLACE, contact)
    assert found.members(PLACE, 20, limits.RELOCATE_S) == tuple(NEAREST[10:])
    found.lost(PLACE, NEAREST[10])
    assert found.members(PLACE, 20, limits.RELOCATE_S - 0.1) == tuple(NEAREST[11:])
    assert not is_known(found, limits.RELOCATE_S)


def test_where_all_are_lost_nobody_waits_to_look() -> None:
    found = located()
    for contact in NEAREST:
        found.lost(PLACE, contact)
    assert not is_known(found, 0.1)


def test_what_is_said_to_have_changed_is_looked_at_before_its_next_use() -> None:
    found = located()
    found.changed(PLACE)
    assert not is_known(found, limits.RELOCATE_S)
    look(found, limits.RELOCATE_S)
    assert is_known(found, 3 * limits.RELOCATE_S), "the look settled it"


def test_the_longest_unused_of_too_many_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NEIGHBOURHOODS_MAX", 3)
    found, places = Neighbourhoods(), [bytes([number]) * 32 for number in range(4)]
    for place in places[:3]:
        found.located(place, NEAREST, 20, [], [], 0.0)
    assert found.members(places[0], 20, 1.0)
    found.located(places[3], NEAREST, 20, [], [], 0.0)
    assert len(found) == 3
    assert [bool(found.members(place, 20, 1.0)) for place in places] == [True, False, True, True]


# --- looking again, and telling others ---


def test_looking_again_begins_with_members_strangers_and_who_else_was_named() -> None:
    found = Neighbourhoods()
    found.located(PLACE, SETTLED, 20, [*SETTLED, *ALL[30:]], [STRANGERS[0].id], 0.0)
    name(found, STRANGERS)
    found.lost(PLACE, SETTLED[5])
    start, _ = found.start(PLACE, 1.0)
    assert start == [*SETTLED[:5], *SETTLED[6:], *STRANGERS[1:], *ALL[30:]]


def test_members_that_answered_lately_need_not_answer_again_but_the_nearest_few() -> None:
    found = located()
    assert found.start(PLACE, limits.ANSWERED_S - 0.1)[1] == NEAREST[limits.ASKED_AGAIN :]
    assert found.start(PLACE, limits.ANSWERED_S)[1] == []
    later = limits.ANSWERED_S - 1.0
    for contact in (NEAREST[0], NEAREST[7], FARTHER[0]):
        found.named(PLACE, contact, [], later)
    assert found.start(PLACE, limits.ANSWERED_S)[1] == [NEAREST[7]]
    assert found.start(PLACE, later + limits.ANSWERED_S)[1] == []


def test_who_wants_it_fresher_believes_later_answers_only() -> None:
    found, fresh_s = located(), limits.THOROUGH_S
    assert found.start(PLACE, fresh_s - 0.1, fresh_s)[1] == NEAREST[limits.ASKED_AGAIN :]
    assert found.start(PLACE, fresh_s, fresh_s)[1] == []


def test_where_there_were_too_few_everybody_is_asked_again() -> None:
    assert located(NEAREST[:19]).start(PLACE, 0.0) == ([], [])
    assert Neighbourhoods().start(PLACE, 0.0) == ([], [])


def test_strangers_and_others_around_are_bounded() -> None:
    found = Neighbourhoods()
    crowd = [Contact(identity(number).peer_id) for number in range(100, 400)]
    found.located(PLACE, NEAREST, 20, [*NEAREST, *crowd[: limits.KSIZE + 5]], [], 0.0)
    for contact in crowd[limits.KSIZE + 5 :]:
        contact.long_id = int.from_bytes(PLACE, "big") ^ 1  # nearer than all
        name(found, [contact])
    start, _ = found.start(PLACE, 0.0)
    assert len(start) == len(NEAREST) + 2 * limits.KSIZE
    assert not is_known(found, limits.RELOCATE_S)


def test_members_that_were_assumed_to_be_there_do_not_answer_by_that() -> None:
    found = located()
    for now in (20.0, 40.0):
        _, assumed = found.start(PLACE, now)
        assert assumed == NEAREST[limits.ASKED_AGAIN :]
        found.located(PLACE, NEAREST, 20, [], [], now, assumed)
    assert found.start(PLACE, limits.ANSWERED_S)[1] == []


def test_a_member_lost_while_others_were_asked_stays_lost_and_is_looked_for_again() -> None:
    found = located()
    _, assumed = found.start(PLACE, 1.0)
    found.lost(PLACE, NEAREST[10])
    found.located(PLACE, NEAREST, 20, [], [], 2.0, assumed)
    assert found.members(PLACE, 20, 2.0) == (*NEAREST[:10], *NEAREST[11:])
    assert is_known(found, 2.0 + limits.RELOCATE_S - 0.1)
    assert not is_known(found, 2.0 + limits.RELOCATE_S)


def test_one_that_is_gone_is_a_member_nowhere() -> None:
    found, other = located(), location_of(b"another key")
    found.located(other, NEAREST, 20, [], [], 0.0)
    found.gone(NEAREST[3])
    for place in (PLACE, other):
        assert found.members(place, 20, 1.0) == (*NEAREST[:3], *NEAREST[4:])


def test_others_are_told_of_the_nearest_members_as_long_as_they_are_believed() -> None:
    found = located()
    assert found.told(PLACE, limits.LOCATED_S - 0.1, []) == NEAREST[: limits.LOCATED_HOLDERS]
    assert found.told(PLACE, limits.LOCATED_S, []) == []
    assert found.told(location_of(b"another key"), 0.0, []) == []
    assert found.told(PLACE, 0.0, [FARTHER[0], NEAREST[2]]) == [*NEAREST[:2], *NEAREST[3 : limits.LOCATED_HOLDERS]]
    found.lost(PLACE, NEAREST[0])
    assert found.told(PLACE, 1.0, []) == NEAREST[1 : limits.LOCATED_HOLDERS + 1]


@pytest.mark.parametrize("there", range(limits.CONTACTS_PER_GROUP_AND_BUCKET + 2))
def test_others_are_told_of_no_more_of_one_address_group_than_a_bucket_may_hold(there: int) -> None:
    group = "198.51.100.0/24"
    crowd = [Contact(contact.peer, group=group if place < 7 else "") for place, contact in enumerate(NEAREST)]
    others = [Contact(contact.peer, group=group) for contact in FARTHER[:there]]
    told = located(crowd).told(PLACE, 0.0, others)
    room = max(0, limits.CONTACTS_PER_GROUP_AND_BUCKET - there)
    assert told == [*crowd[:room], *crowd[7 : limits.LOCATED_HOLDERS]]
