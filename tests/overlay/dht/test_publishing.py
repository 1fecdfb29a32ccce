"""Our own records: when each is due again, what was abandoned, and who lacks what."""

from __future__ import annotations

import pytest

from overlay.dht import limits
from overlay.dht.publishing import Publication, Publications
from overlay.dht.records import location_of
from overlay.dht.table import Contact
from overlay.errors import LimitExceeded
from tests.overlay.network import identity

KEY, OTHER = b"k" * 32, b"o" * 32
CONTACTS = [Contact(identity(number).peer_id) for number in range(100, 125)]
TTL_S = 60.0


def published(*subkeys: bytes, now: float = 0.0, offered: bool = True) -> Publications:
    """Records of this key, out at the first contact if nothing else is said."""
    ours = Publications(identity(1))
    for subkey in subkeys or (b"a",):
        entry = ours.set(KEY, subkey, b"value of " + subkey, TTL_S, now, 1000.0)
        if offered:
            ours.offered(entry, CONTACTS[:1], now)
    return ours


def entry_of(ours: Publications, subkey: bytes = b"a") -> Publication:
    entry = ours.get(KEY, subkey)
    assert entry is not None
    return entry


def test_a_record_that_was_taken_is_due_again_at_half_its_life() -> None:
    ours = published(now=100.0)
    assert ours.next_due() == 100.0 + TTL_S / 2
    assert ours.due(129.9) == []
    assert ours.due(130.0) == [entry_of(ours)]


def test_a_record_that_nobody_answered_to_is_due_again_soon() -> None:
    ours = published(offered=False)
    ours.offered(entry_of(ours), [], 100.0)
    assert ours.next_due() == 100.0 + limits.REPUBLISH_RETRY_S


def test_a_record_for_which_no_holder_has_room_waits_for_half_its_life() -> None:
    ours = published(offered=False)
    ours.offered(entry_of(ours), [], 100.0, is_full=True)
    assert ours.next_due() == 100.0 + TTL_S / 2
    assert not entry_of(ours).ever_offered


def test_a_short_life_is_never_retried_later_than_at_its_half() -> None:
    ours = Publications(identity(1))
    entry = ours.set(KEY, b"a", b"x", 4.0, 0.0, 1000.0)
    ours.offered(entry, [], 0.0)
    assert ours.next_due() == 2.0


def test_a_renewal_has_a_higher_sequence_and_is_newer_and_one_that_was_never_out_needs_none() -> None:
    ours = published()
    before = entry_of(ours)
    after = ours.renewed(before, 30.0, 1030.0)
    assert after.record.sequence > before.record.sequence
    assert (after.record.value, after.record.ttl_s) == (before.record.value, before.record.ttl_s)
    assert after.serial > before.serial
    assert (ours.is_current(after), ours.is_current(before)) == (True, False)
    fresh = published(offered=False)
    assert fresh.renewed(entry_of(fresh), 30.0, 1030.0) is entry_of(fresh)


def test_what_is_abandoned_is_not_renewed_and_forgotten_at_the_end_of_its_life() -> None:
    ours = published(b"a", b"b")
    ours.abandon(KEY, b"a")
    assert [entry.record.subkey for entry in ours.due(30.0)] == [b"b"]
    ours.offered(entry_of(ours, b"b"), CONTACTS[:1], 30.0)
    assert ours.next_due() == TTL_S
    ours.due(TTL_S - 0.1)
    assert ours.get(KEY, b"a") is not None
    ours.due(TTL_S)
    assert ours.get(KEY, b"a") is None
    assert ours.get(KEY, b"b") is not None
    assert len(ours) == 1


def test_what_is_abandoned_can_be_withdrawn_until_its_end() -> None:
    ours = published()
    ours.abandon(KEY, b"a")
    before = entry_of(ours).record
    tombstone = ours.set(KEY, b"a", b"", before.ttl_s, 50.0, 1050.0)
    assert tombstone.record.is_withdrawn
    assert tombstone.record.sequence > before.sequence
    assert ours.due(50.0) == [tombstone], "it has to go out"
    ours.due(50.0 + TTL_S)
    assert len(ours) == 0


def test_what_is_abandoned_and_set_again_is_renewed_as_any_other() -> None:
    ours = published()
    ours.abandon(KEY, b"a")
    entry = ours.set(KEY, b"a", b"again", TTL_S, 20.0, 1020.0)
    ours.offered(entry, CONTACTS[:1], 20.0)
    assert ours.due(50.0) == [entry]
    assert ours.due(20.0 + TTL_S) == [entry]


def test_to_abandon_what_was_never_published_is_nothing() -> None:
    ours = published()
    ours.abandon(KEY, b"never")
    ours.abandon(OTHER, b"a")
    assert ours.due(30.0) == [entry_of(ours)]


def test_a_place_frees_up_when_what_was_abandoned_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PUBLISHED_MAX", 2)
    ours = published(b"a", b"b")
    with pytest.raises(LimitExceeded):
        ours.set(KEY, b"c", b"x", TTL_S, 0.0, 1000.0)
    ours.abandon(KEY, b"a")
    ours.due(TTL_S)
    ours.set(KEY, b"c", b"x", TTL_S, TTL_S, 1060.0)


def test_new_members_of_a_neighbourhood_lack_what_lies_there() -> None:
    ours = published(b"a", b"b")
    ours.handed_over(entry_of(ours, b"b"), CONTACTS[1])
    lacking = ours.lacked_by(location_of(KEY), CONTACTS[:3], limits.KSIZE)
    assert [(entry.record.subkey, contacts) for entry, contacts in lacking] == [
        (b"a", CONTACTS[1:3]),
        (b"b", CONTACTS[2:3]),
    ]
    assert ours.lacked_by(location_of(KEY), CONTACTS[:1], limits.KSIZE) == []
    assert ours.lacked_by(location_of(OTHER), CONTACTS, limits.KSIZE) == []


def test_what_has_not_been_out_or_is_abandoned_is_offered_to_nobody_new() -> None:
    fresh = published(offered=False)
    assert fresh.lacked_by(location_of(KEY), CONTACTS, limits.KSIZE) == []
    ours = published(b"a", b"b")
    ours.abandon(KEY, b"a")
    assert [entry.record.subkey for entry, _ in ours.lacked_by(location_of(KEY), CONTACTS, limits.KSIZE)] == [b"b"]
    assert [entry.record.subkey for entry in ours.wanted_by(CONTACTS[5], limits.KSIZE)] == [b"b"]


def test_a_withdrawal_is_given_to_new_members_too() -> None:
    ours = published()
    tombstone = ours.set(KEY, b"a", b"", TTL_S, 10.0, 1010.0)
    assert ours.lacked_by(location_of(KEY), CONTACTS[:2], limits.KSIZE) == [(tombstone, CONTACTS[:2])]


def test_what_was_set_after_a_serial_is_told_in_that_order_and_withdrawals_too() -> None:
    ours = published(b"a", b"b", b"c")
    ours.set(KEY, b"a", b"", TTL_S, 10.0, 1010.0)
    ours.set(OTHER, b"a", b"elsewhere", TTL_S, 10.0, 1010.0)
    told = ours.newer(KEY, 0, 10.0)
    assert [(entry.record.subkey, entry.record.is_withdrawn) for entry in told] == [
        (b"b", False),
        (b"c", False),
        (b"a", True),
    ]
    assert ours.newer(KEY, told[1].serial, 10.0) == told[2:]
    assert ours.newer(KEY, told[2].serial, 10.0) == []


def test_what_is_kept_up_has_all_its_life_left_and_what_ends_only_the_rest() -> None:
    ours = published(b"a", b"b", b"c")
    ours.abandon(KEY, b"b")
    ours.set(KEY, b"c", b"", TTL_S, 5.0, 1005.0)
    left = {entry.record.subkey: entry.left_s for entry in ours.newer(KEY, 0, 20.0)}
    assert left == {b"a": TTL_S, b"b": TTL_S - 20.0, b"c": TTL_S - 15.0}


@pytest.mark.parametrize(
    ("ttl_s", "ksize", "copies"),
    [
        (limits.SHORT_LIVED_S, 20, limits.COPIES_OF_SHORT_LIVED),
        (limits.SHORT_LIVED_S + 1, 20, 20),
        (limits.SHORT_LIVED_S, 4, 4),
    ],
)
def test_what_lives_shortly_has_fewer_holders(ttl_s: int, ksize: int, copies: int) -> None:
    ours = Publications(identity(1))
    entry = ours.set(KEY, b"a", b"x", ttl_s, 0.0, 1000.0)
    assert entry.copies(ksize) == copies
    nearest = sorted(CONTACTS, key=lambda contact: contact.long_id ^ int.from_bytes(entry.location, "big"))
    ours.offered(entry, nearest[1:2], 0.0)
    ((_, lacking),) = ours.lacked_by(entry.location, nearest[:ksize], ksize)
    assert lacking == [nearest[0], *nearest[2:copies]]
    ours.offered(entry, nearest[1:copies], 0.0)
    assert ours.wanted_by(nearest[-1], ksize) == [entry], "there are too few"
    ours.offered(entry, nearest[1 : copies + 1], 0.0)
    assert ours.wanted_by(nearest[-1], ksize) == []
    assert ours.wanted_by(nearest[0], ksize) == [entry]


@pytest.mark.parametrize(
    ("ttl_s", "copies"),
    [(limits.SHORT_LIVED_S, limits.COPIES_OF_SHORT_LIVED), (limits.SHORT_LIVED_S + 1, limits.KSIZE)],
)
def test_with_many_holders_a_new_contact_counts_if_it_is_nearer_than_the_last_of_as_many_as_there_are_to_be(
    ttl_s: int, copies: int
) -> None:
    ours = Publications(identity(1))
    entry = ours.set(KEY, b"a", b"x", ttl_s, 0.0, 1000.0)
    nearest = sorted(CONTACTS, key=lambda contact: contact.long_id ^ int.from_bytes(entry.location, "big"))
    nearer, farther = nearest[copies - 1], nearest[copies + 1]
    holders = [contact for contact in nearest if contact not in (nearer, farther)]
    assert len(holders) > copies
    ours.offered(entry, holders[::-1], 0.0)
    assert ours.wanted_by(nearer, limits.KSIZE) == [entry]
    assert ours.wanted_by(farther, limits.KSIZE) == [], "though some have it that are farther still"
