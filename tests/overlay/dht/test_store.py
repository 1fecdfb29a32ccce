"""What a holder keeps: life from receipt, bounds in every direction, diversity under a full key."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from overlay.dht import limits
from overlay.dht.records import seal_record
from overlay.dht.store import Put, RecordStore, StoreRate
from tests.overlay.dht.test_records import KEY, sealed
from tests.overlay.network import identity


def test_a_record_lives_as_long_as_it_says_from_its_receipt() -> None:
    store = RecordStore()
    assert store.put(sealed(ttl_s=60), 100.0) is Put.STORED
    assert store.get(KEY, 159.9) == (sealed(ttl_s=60),)
    assert store.get(KEY, 160.0) == ()
    assert (store.count, store.size_bytes) == (0, 0)


def test_the_same_version_again_does_not_renew_and_an_older_one_is_stale() -> None:
    store = RecordStore()
    store.put(sealed(sequence=5, ttl_s=60), 0.0)
    assert store.put(sealed(sequence=5, ttl_s=60), 50.0) is Put.UNCHANGED
    assert store.put(sealed(sequence=4, ttl_s=60), 50.0) is Put.STALE
    assert store.get(KEY, 61.0) == ()


def test_a_newer_version_replaces_and_lives_anew() -> None:
    store = RecordStore()
    store.put(sealed(sequence=1, ttl_s=60), 0.0)
    assert store.put(sealed(sequence=2, ttl_s=60, value=b"new"), 50.0) is Put.STORED
    assert [record.value for record in store.get(KEY, 100.0)] == [b"new"]
    assert store.count == 1


def test_a_withdrawal_keeps_older_copies_out() -> None:
    store = RecordStore()
    store.put(sealed(sequence=2, value=b""), 0.0)
    assert store.put(sealed(sequence=1), 1.0) is Put.STALE
    assert store.get(KEY, 1.0)[0].is_withdrawn


def test_bytes_and_records_of_one_publisher_are_bounded() -> None:
    store = RecordStore(bytes_max=10 * 20_000)
    outcomes = [store.put(sealed(subkey=bytes([n]), value=bytes(16_000)), 0.0) for n in range(20)]
    assert outcomes.count(Put.STORED) < 15
    assert outcomes[-1] is Put.FULL
    assert store.size_bytes <= 10 * 20_000
    store = RecordStore()
    outcomes = []
    for number in range(limits.RECORDS_PER_PUBLISHER_MAX + 10):
        record = seal_record(identity(1), number.to_bytes(32, "big"), b"", 1, 60, b"x")
        outcomes.append(store.put(record, 0.0))
    assert outcomes.count(Put.STORED) == limits.RECORDS_PER_PUBLISHER_MAX


def test_a_full_key_makes_room_for_a_rarer_address_group_and_for_no_other() -> None:
    store = RecordStore()
    for number in range(limits.RECORDS_PER_KEY_MAX):
        assert store.put(sealed(number + 1), 0.0, "10.0.0.0/24") is Put.STORED
    assert store.put(sealed(9000), 1.0, "10.0.0.0/24") is Put.FULL
    assert store.put(sealed(9001), 1.0, "192.0.2.0/24") is Put.STORED
    assert store.count == limits.RECORDS_PER_KEY_MAX
    assert sealed(1) in store.get(KEY, 1.0), "the oldest stay"


def test_a_peer_may_store_so_often_and_no_more_until_time_has_passed() -> None:
    rate = StoreRate(per_minute=10)
    assert [rate.admit(b"p", 0.0) for _ in range(12)].count(True) == 10
    assert rate.admit(b"other", 0.0)
    assert not rate.admit(b"p", 1.0)
    assert rate.admit(b"p", 7.0)


LARGE = limits.VALUE_BYTES_MAX
FITTING = limits.BYTES_PER_KEY_MAX // sealed(value=bytes(LARGE)).size_bytes


def full_of_bytes(group: str = "10.0.0.0/24") -> RecordStore:
    """With a key of as many large records as it may have."""
    store = RecordStore()
    for number in range(FITTING):
        assert store.put(sealed(number + 1, value=bytes(LARGE)), 0.0, group) is Put.STORED
    return store


def test_the_bytes_of_one_key_are_bounded_and_other_keys_have_room() -> None:
    store = full_of_bytes()
    assert FITTING < limits.RECORDS_PER_KEY_MAX
    assert store.put(sealed(9000, value=bytes(LARGE)), 0.0, "10.0.0.0/24") is Put.FULL
    other = seal_record(identity(9000), b"another key", b"", 1, 60, bytes(LARGE))
    assert store.put(other, 0.0, "10.0.0.0/24") is Put.STORED


def test_a_key_full_of_bytes_makes_room_for_a_rarer_address_group() -> None:
    store = full_of_bytes()
    assert store.put(sealed(9000, value=bytes(LARGE)), 0.0, "192.0.2.0/24") is Put.STORED
    assert store.count == FITTING


def test_room_is_not_made_where_one_that_goes_would_not_be_enough() -> None:
    store = RecordStore()
    for number in range(FITTING):
        store.put(sealed(number + 1, value=bytes(LARGE)), 0.0, "")
    spare = limits.BYTES_PER_KEY_MAX - FITTING * sealed(value=bytes(LARGE)).size_bytes
    small = sealed(8000, value=b"x")
    assert small.size_bytes <= spare, "a small one fits yet"
    store.put(small, 0.0, "")
    before = store.count
    assert store.put(sealed(9000, value=bytes(LARGE)), 0.0, "192.0.2.0/24") is Put.FULL
    assert store.count == before, "nothing went for nothing"


def test_a_renewal_may_not_grow_a_key_past_its_bytes_and_the_former_version_stays() -> None:
    store = full_of_bytes()
    while store.put(sealed(store.count + 1, value=b"x"), 0.0, "10.0.0.0/24") is Put.STORED:
        assert store.count < FITTING + 40
    small = store.count
    assert store.put(sealed(small, sequence=2, value=bytes(LARGE)), 1.0) is Put.FULL
    assert [record.sequence for record in store.get(KEY, 1.0) if record.publisher == identity(small).peer_id] == [1]
    assert store.put(sealed(1, sequence=2, value=bytes(LARGE)), 1.0) is Put.STORED, "one as large as before"
    assert store.put(sealed(2, sequence=2, value=b"x"), 1.0) is Put.STORED, "one that shrinks"
    assert store.put(sealed(small, sequence=2, value=bytes(LARGE)), 1.0) is Put.STORED, "in the room that made"


def test_what_expires_frees_the_bytes_of_its_key() -> None:
    store = full_of_bytes()
    assert store.put(sealed(9000, value=bytes(LARGE)), 60.0, "10.0.0.0/24") is Put.STORED
    assert store.count == 1
    for number in range(FITTING - 1):
        assert store.put(sealed(number + 1, sequence=2, value=bytes(LARGE)), 60.0, "10.0.0.0/24") is Put.STORED
    assert store.put(sealed(9001, value=bytes(LARGE)), 60.0, "10.0.0.0/24") is Put.FULL


def test_newer_records_are_those_taken_after_a_serial_the_oldest_first_with_the_life_they_have_left() -> None:
    store = RecordStore()
    for number in range(1, 6):
        store.put(sealed(number, ttl_s=60), float(number))
    everything = store.newer(KEY, 0, 10.0)
    assert [entry.record for entry in everything] == [sealed(number, ttl_s=60) for number in range(1, 6)]
    assert [entry.left_s for entry in everything] == [51.0, 52.0, 53.0, 54.0, 55.0]
    assert store.newer(KEY, everything[2].serial, 10.0) == everything[3:]
    assert store.newer(KEY, everything[-1].serial, 10.0) == []
    assert store.newer(b"another key", 0, 10.0) == []


def test_what_is_renewed_is_newer_and_told_last_and_what_is_over_is_not_told() -> None:
    store = RecordStore()
    for number in range(1, 4):
        store.put(sealed(number, ttl_s=60), 0.0)
    last = store.newer(KEY, 0, 0.0)[-1].serial
    store.put(sealed(1, sequence=1, ttl_s=60), 30.0)
    assert store.newer(KEY, last, 30.0) == [], "the same again is no news"
    store.put(sealed(1, sequence=2, ttl_s=60), 30.0)
    assert [entry.record.sequence for entry in store.newer(KEY, last, 30.0)] == [2]
    assert store.newer(KEY, 0, 30.0)[-1].record == sealed(1, sequence=2, ttl_s=60)
    assert [entry.record for entry in store.newer(KEY, 0, 60.0)] == [sealed(1, sequence=2, ttl_s=60)]


def test_serials_are_of_the_whole_store_so_that_no_key_says_the_same_one_twice() -> None:
    store = RecordStore()
    other = seal_record(identity(1), b"another key", b"sub", 1, 60, b"x")
    store.put(sealed(1), 0.0)
    store.put(other, 0.0)
    store.put(sealed(2), 61.0)
    ((again,), (first,)) = store.newer(KEY, 0, 61.0), store.newer(KEY, 0, 61.0)
    assert again == first
    assert again.serial == 3, "a key that was empty in between goes on from there"


def test_one_publisher_takes_few_places_of_a_key_and_has_them_again_when_they_are_over() -> None:
    store = RecordStore()
    count = limits.RECORDS_PER_KEY_AND_PUBLISHER_MAX
    outcomes = [store.put(sealed(subkey=bytes([number])), 0.0) for number in range(count + 2)]
    assert outcomes == [*[Put.STORED] * count, Put.FULL, Put.FULL]
    assert store.put(sealed(subkey=bytes([0]), sequence=7), 1.0) is Put.STORED, "a renewal takes no place"
    assert store.put(sealed(2, subkey=bytes([99])), 1.0) is Put.STORED, "another's place is another"
    assert store.put(sealed(subkey=bytes([99])), 61.5) is Put.STORED


@pytest.mark.parametrize("seed", range(3))
def test_fingerprints_of_a_key_are_those_of_its_live_records_whatever_comes_and_ends(seed: int) -> None:
    draws, store, now, sizes = random.Random(seed), RecordStore(), 0.0, []
    for _ in range(300):
        now += draws.random() * 2
        key, life_s = draws.choice([b"one", b"two"]), draws.randrange(1, 60)
        name, sequence = bytes([draws.randrange(12)]), draws.randrange(1, 6)
        store.put(seal_record(identity(1), key, name, sequence, life_s, b"value"), now)
        for found in (b"one", b"two", b"none"):
            live = [record.fingerprint for record in store.get(found, now)]
            assert sorted(store.fingerprints(found, now)) == sorted(live)
            sizes.append(len(live))
    assert max(sizes) > 5


def test_of_two_with_the_same_fingerprint_one_may_go() -> None:
    store, whole = RecordStore(), seal_record(identity(1), b"key", b"a", 1, 60, b"value")
    twin = replace(whole, subkey=b"b", ttl_s=5)
    store.put(whole, 0.0)
    store.put(twin, 0.0)
    assert list(store.fingerprints(b"key", 10.0)) == [whole.fingerprint]
    assert list(store.fingerprints(b"key", 60.0)) == []
