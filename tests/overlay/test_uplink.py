"""What the estimate of an uplink believes, on hand-computed numbers."""

from __future__ import annotations

import asyncio

import pytest

from overlay import limits
from overlay.host import Host
from overlay.uplink import Uplink
from tests.overlay.network import run_hosts

KIB = 1 << 10


def blocked_for(uplink: Uplink, seconds: float, until: float, moved: int = 64 * KIB) -> float | None:
    uplink.blocked(moved, until - seconds)
    uplink.resumed(0, until)
    return uplink.bytes_per_s


def test_nothing_is_known_before_the_socket_was_full() -> None:
    uplink = Uplink()
    assert uplink.bytes_per_s is None
    assert uplink.chunk_bytes(is_paced=False) == limits.CHUNK_BYTES_MAX
    assert uplink.chunk_bytes(is_paced=True) == limits.CHUNK_BYTES_PACED


def test_what_left_while_the_socket_was_full_is_the_rate() -> None:
    uplink = Uplink()
    uplink.blocked(80_000, 10.0)
    uplink.resumed(30_000, 10.5)
    assert uplink.bytes_per_s == 100_000
    assert uplink.chunk_bytes(is_paced=True) == limits.CHUNK_BYTES_MIN
    assert blocked_for(uplink, 0.01, 11.0, moved=40_000) == pytest.approx(4e6)
    assert uplink.chunk_bytes(is_paced=True) == pytest.approx(20_000, abs=1)  # 5 ms of it


def test_a_reader_without_time_does_not_make_the_uplink_slow_at_once_and_a_slow_path_does_in_the_end() -> None:
    uplink = Uplink()
    assert blocked_for(uplink, 0.001, 100.0, moved=1_000_000) == pytest.approx(1e9)
    assert blocked_for(uplink, 1.0, 100.0 + limits.UPLINK_HALF_LIFE_S) == pytest.approx(0.5e9)
    rates = [blocked_for(uplink, 1.0, 110.0 + 3.0 * number) for number in range(20)]
    assert rates[-1] == 64 * KIB


def test_a_moment_without_length_or_without_bytes_measures_nothing() -> None:
    uplink = Uplink()
    assert blocked_for(uplink, 0.0, 5.0) is None
    assert blocked_for(uplink, 1.0, 6.0, moved=0) is None


def test_what_the_pacer_measured_counts_but_not_to_a_peer_on_the_same_wire() -> None:
    uplink = Uplink()
    uplink.paced(1e6, limits.NEAR_RTT_S / 2)
    uplink.paced(1e6, None)
    uplink.paced(None, 0.05)
    assert uplink.bytes_per_s is None
    uplink.paced(1e6, 0.05)
    assert uplink.bytes_per_s == 1e6


def test_to_a_loopback_address_there_is_no_wire_to_measure_or_to_keep_free() -> None:
    uplink = Uplink()
    uplink.is_wire = False
    assert blocked_for(uplink, 1.0, 5.0) is None
    uplink.paced(1e6, 0.05)
    assert uplink.bytes_per_s is None
    assert uplink.chunk_bytes(is_paced=True) == limits.CHUNK_BYTES_MAX


def test_a_connection_on_loopback_never_takes_its_way_for_slow() -> None:
    async def scene(one: Host, two: Host) -> None:
        connection = await one.connect(two.peer_id, two.addresses)
        connection.pause_writing()
        await asyncio.sleep(0)
        connection._uplink._blocked_bytes = 64 * KIB
        connection.resume_writing()
        assert connection.uplink_bytes_per_s is None

    run_hosts(2, scene)
