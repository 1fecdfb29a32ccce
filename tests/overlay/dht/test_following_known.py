"""Keys that are followed: what a reader keeps of what it was told."""

from __future__ import annotations

import pytest

from overlay.dht import limits
from overlay.dht.following import Known
from overlay.dht.lookup import Found
from overlay.dht.records import Record, location_of
from overlay.dht.table import Contact
from tests.overlay.dht.test_records import KEY, sealed
from tests.overlay.network import identity

LASTING_S = limits.SHORT_LIVED_S + 1
"""The life of a record that holders are told of where they lack it."""
CONTACTS = sorted(
    (Contact(identity(number).peer_id) for number in range(100, 120)),
    key=lambda contact: contact.long_id ^ int.from_bytes(location_of(KEY), "big"),
)


def told(*records: Record, left_s: float | None = None, cursor: bytes = b"cursor") -> Found:
    """An answer with these records, which have so long to live: all of their time if it isn't said."""
    return Found((), records, tuple(record.ttl_s if left_s is None else left_s for record in records), cursor)


def plain(number: int, size_bytes: int = 1, sequence: int = 1, ttl_s: int = 60) -> Record:
    """A record that nobody signed: `Known` is told only of verified ones."""
    signature = number.to_bytes(4, "big") + sequence.to_bytes(4, "big")
    return Record(KEY, identity(1).peer_id, number.to_bytes(4, "big"), sequence, ttl_s, bytes(size_bytes), signature)


def numbers(known: Known, now: float = 0.0) -> list[int]:
    return [int.from_bytes(record.subkey, "big") for record in known.live(now)]


def test_a_record_lives_as_long_as_its_holder_says_that_it_has_left() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60), left_s=10.0), 100.0)
    assert known.live(109.9) == [sealed(ttl_s=60)]
    assert known.live(110.0) == []


def test_of_two_holders_the_one_that_has_it_longer_is_believed_but_not_past_its_life_from_first_sight() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60), left_s=10.0), 100.0)
    known.heard(b"b", told(sealed(ttl_s=60), left_s=20.0), 100.0)
    assert known.live(119.9) and not known.live(120.0)
    known.heard(b"c", told(sealed(ttl_s=60), left_s=60.0), 115.0)
    assert known.live(159.9) and not known.live(160.0)


def test_a_holder_that_has_it_less_long_takes_nothing_away() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60), left_s=50.0), 100.0)
    known.heard(b"b", told(sealed(ttl_s=60), left_s=1.0), 100.0)
    assert known.live(149.9)


def test_one_that_claims_more_life_than_a_record_was_given_is_not_believed() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60), left_s=9000.0), 100.0)
    assert known.live(159.9) and not known.live(160.0)


def test_what_is_over_does_not_come_back_by_being_told_again() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60)), 100.0)
    for now in (160.0, 190.0, 219.9):
        known.heard(b"b", told(sealed(ttl_s=60)), now)
        assert known.live(now) == []


def test_what_is_over_is_forgotten_after_as_long_again() -> None:
    known = Known()
    known.heard(b"a", told(sealed(ttl_s=60)), 100.0)
    known.live(219.9)
    assert len(known) == 1
    known.live(220.0)
    assert len(known) == 0


def test_a_newer_version_lives_anew_and_an_older_one_changes_nothing() -> None:
    known = Known()
    known.heard(b"a", told(sealed(sequence=2, ttl_s=60)), 100.0)
    known.heard(b"b", told(sealed(sequence=1, ttl_s=60, value=b"old")), 150.0)
    assert [record.sequence for record in known.live(159.9)] == [2]
    assert known.live(160.0) == []
    known.heard(b"a", told(sealed(sequence=3, ttl_s=60)), 170.0)
    assert [record.sequence for record in known.live(229.9)] == [3]


def test_a_withdrawal_hides_a_record_and_keeps_older_copies_out() -> None:
    known = Known()
    known.heard(b"a", told(sealed(sequence=1)), 0.0)
    known.heard(b"a", told(sealed(sequence=2, value=b"")), 1.0)
    known.heard(b"b", told(sealed(sequence=1)), 2.0)
    assert known.live(2.0) == []


def test_cursors_are_kept_of_holders_only() -> None:
    known, (one, other, *_) = Known(), CONTACTS
    for contact in (one, other):
        known.heard(contact.id, told(cursor=contact.id[:8]), 0.0)
    known.keep_cursors_of([other, CONTACTS[5]])
    assert [known.cursor_of(contact.id) for contact in (one, other, CONTACTS[5])] == [b"", other.id[:8], b""]


def test_of_what_a_holder_lacks_that_counts_which_is_known_for_a_while_and_the_rest_is_waited_for() -> None:
    known, at = Known(), limits.CORRECTED_AFTER_S
    lacking = [sealed(1, sequence=5, ttl_s=LASTING_S), sealed(2, ttl_s=LASTING_S), sealed(3, ttl_s=LASTING_S)]
    known.heard(b"a", told(lacking[0]), 0.0)
    known.heard(b"a", told(lacking[1]), 5.0)
    assert known.lacked(lacking, at - 0.1) == []
    assert known.lacked(lacking, at) == lacking[:1]
    assert known.lacked(lacking[1:], at) == []
    assert known.lacked(lacking, at + 5.0) == lacking[:2]
    assert known.lacked(lacking, LASTING_S - 0.1) == lacking[:2]
    assert known.lacked(lacking, LASTING_S + 5.0) == [], "what is over is lacked by nobody"


def test_no_holder_is_told_of_what_lives_shortly() -> None:
    known, at = Known(), limits.CORRECTED_AFTER_S
    lacking = [sealed(number, ttl_s=limits.SHORT_LIVED_S + number - 2) for number in (1, 2, 3)]
    known.heard(b"a", told(*lacking), 0.0)
    assert known.lacked(lacking, at) == lacking[2:]
    assert known.lacked(lacking[:2], at) == []


def test_what_lives_shortly_takes_no_room_among_what_a_holder_is_told() -> None:
    known, many = Known(), [plain(number) for number in range(limits.CORRECTED_RECORDS_MAX)]
    lasting = plain(len(many), ttl_s=LASTING_S)
    known.heard(b"a", told(*many, lasting), 0.0)
    assert known.lacked([*many, lasting], limits.CORRECTED_AFTER_S) == [lasting]


def test_a_holder_is_told_a_bounded_number_of_records_at_once() -> None:
    known, many = Known(), [plain(number, ttl_s=LASTING_S) for number in range(3 * limits.CORRECTED_RECORDS_MAX)]
    known.heard(b"a", told(*many), 0.0)
    assert len(known.lacked(many, limits.CORRECTED_AFTER_S)) == limits.CORRECTED_RECORDS_MAX


def test_what_a_holder_might_tell_again_is_what_was_heard_from_others_since_its_last_answer() -> None:
    known = Known()
    known.heard(b"a", told(sealed(1)), 0.0)
    known.heard(b"b", told(sealed(2)), 5.0)
    known.heard(b"b", told(sealed(3)), 8.0)
    assert known.news_for(b"a", 9.0) == [sealed(1), sealed(2), sealed(3)], (
        "in the moment of an answer others may have come"
    )
    assert known.news_for(b"b", 9.0) == [sealed(3)]
    assert known.news_for(b"stranger", 9.0) == [sealed(1), sealed(2), sealed(3)]
    known.heard(b"old", told(cursor=b""), 9.0)
    assert known.news_for(b"old", 9.0) == [sealed(1), sealed(2), sealed(3)], "one without cursors tells all each time"


def test_what_has_less_than_half_of_its_life_left_may_be_told_again_by_others() -> None:
    known = Known()
    known.heard(b"a", told(sealed(1, ttl_s=60), left_s=29.9), 0.0)
    known.heard(b"a", told(sealed(2, ttl_s=60), left_s=40.0), 0.0)
    assert known.news_for(b"b", 0.0) == [sealed(2, ttl_s=60)]
    assert known.news_for(b"b", 10.0) == [sealed(2, ttl_s=60)]
    assert known.news_for(b"b", 10.1) == []


@pytest.mark.parametrize("floods_first", [True, False])
def test_a_flood_from_one_holder_crowds_out_nothing_that_others_tell(floods_first: bool) -> None:
    known, honest = Known(), range(1_000_000, 1_000_200)
    flood = [told(*(plain(number) for number in range(at, at + 1000))) for at in range(0, 10_000, 1000)]
    if floods_first:
        known.heard(b"liar", flood[0], 0.0)
    for holder in (b"a", b"b"):
        known.heard(holder, told(*(plain(number) for number in honest)), 0.0)
    for found in flood:
        known.heard(b"liar", found, 0.0)
        assert len(known) <= limits.RECORDS_PER_KEY_MAX
    assert [number for number in numbers(known) if number >= honest[0]] == list(honest)


def test_what_one_honest_holder_alone_tells_outlasts_anothers_flood() -> None:
    known = Known()
    known.heard(b"a", told(*(plain(1_000_000 + number) for number in range(100))), 0.0)
    known.heard(b"liar", told(*(plain(number) for number in range(3 * limits.RECORDS_PER_KEY_MAX))), 0.0)
    assert sum(number >= 1_000_000 for number in numbers(known)) == 100


def test_what_another_confirms_stays_though_the_flooding_holder_told_it_first() -> None:
    known, honest = Known(), [plain(1_000_000 + number) for number in range(100)]
    known.heard(b"liar", told(*(plain(number) for number in range(300))), 0.0)
    known.heard(b"liar", told(*honest), 0.0)
    known.heard(b"a", told(*honest), 0.0)
    known.heard(b"liar", told(*(plain(number, limits.VALUE_BYTES_MAX, sequence=2) for number in range(300))), 0.0)
    assert 100 < len(known) < 400
    assert sum(number >= 1_000_000 for number in numbers(known)) == 100


def test_what_all_tell_is_bounded_too() -> None:
    known = Known()
    many = [plain(number) for number in range(limits.RECORDS_PER_KEY_MAX + 10)]
    for holder in (b"a", b"b"):
        for at in range(0, len(many), 500):
            known.heard(holder, told(*many[at : at + 500]), 0.0)
    assert len(known) <= limits.RECORDS_PER_KEY_MAX


def test_bytes_are_bounded_and_replaced_ones_free_theirs() -> None:
    known = Known()
    size_bytes = plain(0, limits.VALUE_BYTES_MAX).size_bytes
    fitting = limits.BYTES_PER_KEY_MAX // size_bytes
    known.heard(b"a", told(*(plain(number, limits.VALUE_BYTES_MAX) for number in range(fitting))), 0.0)
    for sequence in range(2, 5):
        known.heard(b"a", told(plain(0, limits.VALUE_BYTES_MAX, sequence)), 0.0)
    assert len(known) == fitting
    known.heard(b"a", told(plain(fitting, limits.VALUE_BYTES_MAX)), 0.0)
    assert len(known) < fitting + 1
    known.live(1000.0)
    known.heard(b"a", told(*(plain(number, limits.VALUE_BYTES_MAX) for number in range(fitting))), 1000.0)
    assert len(known) == fitting, "what was forgotten frees its bytes"
