"""Blame: whose it is, how long it lasts, and that our own never counts."""

from __future__ import annotations

from overlay.errors import Blame
from routing.health import BACKOFF_MAX_S, BACKOFF_MIN_S, SILENT_BACKOFF_S, Fault, Health, fault_of


def test_back_off_doubles_to_its_end_and_success_forgives() -> None:
    health, now = Health(), 0.0
    lengths = []
    for _ in range(12):
        health.blame(b"p", Fault.UNREACHABLE, now)
        length = BACKOFF_MIN_S
        while health.is_avoided(b"p", now + length):
            length *= 2
        lengths.append(length)
        now += length
    assert lengths[:4] == [1.0, 2.0, 4.0, 8.0]
    assert BACKOFF_MAX_S <= lengths[-1] <= 2 * BACKOFF_MAX_S
    health.blame(b"p", Fault.SLOW, now)
    health.forgive(b"p")
    assert not health.is_avoided(b"p", now)


def test_a_peer_that_fell_silent_is_left_alone_for_as_long_as_its_record_may_outlive_it() -> None:
    """netsim, session-prefill, seed 1: a server without power cost the same two drivers 10 s each, twice within 12 s."""
    health = Health()
    health.blame(b"p", Fault.SILENT, 0.0)
    assert health.is_avoided(b"p", SILENT_BACKOFF_S - 0.1)
    assert not health.is_avoided(b"p", SILENT_BACKOFF_S + 0.1)
    health.blame(b"p", Fault.UNREACHABLE, SILENT_BACKOFF_S)
    assert health.is_avoided(b"p", 2.5 * SILENT_BACKOFF_S)
    health.forgive(b"p")
    assert not health.is_avoided(b"p", SILENT_BACKOFF_S)


def test_an_edge_is_blamed_in_both_directions_and_neither_end_is() -> None:
    health = Health()
    health.blame(b"a", Fault.EDGE, 0.0, b"b")
    assert health.is_edge_avoided(b"a", b"b", 0.5)
    assert health.is_edge_avoided(b"b", b"a", 0.5)
    assert not health.is_avoided(b"a", 0.5)
    assert not health.is_avoided(b"b", 0.5)


def test_our_own_faults_and_the_users_count_against_nobody() -> None:
    assert fault_of("conflict", Blame.US) is None
    assert fault_of("bad-request", Blame.USER) is None
    assert fault_of("edge-lost", Blame.EDGE) is Fault.EDGE
    assert fault_of("silent", Blame.PEER) is fault_of("not-ready", Blame.PEER) is Fault.SILENT
    assert fault_of("timed-out", Blame.NETWORK) is Fault.SILENT, "opening a stream to it took 8 s, and would again"
    assert fault_of("bad-signature", Blame.PEER) is Fault.PROTOCOL
    assert fault_of("something-new", Blame.NETWORK) is Fault.UNREACHABLE


def test_a_link_with_one_end_named_counts_against_nobody() -> None:
    health = Health()
    health.blame(b"a", Fault.EDGE, 0.0)
    assert not health.is_avoided(b"a", 0.5)
