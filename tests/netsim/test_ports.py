from __future__ import annotations

import pytest

from netsim.ports import EPOCH_S, Disk, SimRandomness, SimStorage, SimWallClock
from peerd.store import StateError, next_incarnation


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now(self) -> float:
        return self.at_s


def test_a_wall_clock_is_wrong_by_its_skew_and_goes_with_virtual_time() -> None:
    hand = Hand()
    clock = SimWallClock(hand.now, 300.0)
    assert clock.now_s() == EPOCH_S + 1300.0
    hand.at_s += 1
    clock.skew_s -= 600
    assert clock.now_s() == EPOCH_S + 701.0


def test_randomness_is_its_seed_s() -> None:
    one, same, other = SimRandomness("1 a"), SimRandomness("1 a"), SimRandomness("2 a")
    assert one.token(16) == same.token(16) != other.token(16)
    assert one.below(1000) == same.below(1000)
    assert 2.0 <= one.uniform(2.0, 3.0) <= 3.0


def test_what_was_saved_survives_a_restart_and_a_power_cut() -> None:
    disk = Disk(Hand().now)
    assert next_incarnation(SimStorage(disk)) == 1
    disk.power_cut()
    assert next_incarnation(SimStorage(disk)) == 2


def test_a_drive_that_lies_about_syncing_loses_its_last_seconds_to_a_power_cut_but_none_to_a_kill() -> None:
    hand = Hand()
    disk = Disk(hand.now, flush_s=5.0)
    storage = SimStorage(disk)
    storage.save("old", b"1")
    hand.at_s += 5.0
    storage.save("new", b"2")
    storage.detach()
    after_kill = SimStorage(disk)
    assert (after_kill.load("old"), after_kill.load("new")) == (b"1", b"2")
    disk.power_cut()
    assert (after_kill.load("old"), after_kill.load("new")) == (b"1", None)


def test_another_disk_is_empty_and_has_another_number() -> None:
    disk = Disk(Hand().now)
    SimStorage(disk).save("a", b"1")
    disk.wipe()
    assert SimStorage(disk).load("a") is None
    assert disk.number == 2


def test_a_full_disk_refuses_as_the_daemon_s_own_storage_does_and_keeps_what_it_has() -> None:
    disk = Disk(Hand().now)
    storage = SimStorage(disk)
    storage.save("a", b"1")
    disk.is_full = True
    with pytest.raises(StateError, match="No space"):
        storage.save("a", b"2")
    assert storage.load("a") == b"1"


def test_a_dead_process_saves_nothing_and_reads_nothing() -> None:
    disk = Disk(Hand().now)
    ghost = SimStorage(disk)
    ghost.save("a", b"1")
    ghost.detach()
    ghost.save("a", b"2")
    assert ghost.load("a") is None
    assert SimStorage(disk).load("a") == b"1"


@pytest.mark.parametrize("name", ["", "../a", "A", ".a"])
def test_names_that_are_no_state_files_are_refused_as_by_the_real_storage(name: str) -> None:
    storage = SimStorage(Disk(Hand().now))
    with pytest.raises(ValueError, match="not a state file"):
        storage.save(name, b"")
    with pytest.raises(ValueError, match="not a state file"):
        storage.load(name)
