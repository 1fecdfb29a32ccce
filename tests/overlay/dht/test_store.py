"""What a holder keeps: life from receipt, bounds in every direction, diversity under a full key."""

from __future__ import annotations

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
