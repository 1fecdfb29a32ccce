"""Reservations of KV memory: honest sums, and whose lease goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blocks.engine import limits
from blocks.engine.kv_budget import KvBudget
from blocks.protocol.device import LeaseKey

A, B, C = (LeaseKey(bytes([index]) * 16, 0) for index in range(3))


def test_what_fits_is_admitted_and_what_does_not_is_told_when_to_ask_again() -> None:
    budget = KvBudget(100)
    assert budget.reserve(A, 60, 0).admitted
    verdict = budget.reserve(B, 60, 0)
    assert not verdict.admitted
    assert verdict.retry_after_s == limits.BUSY_RETRY_S
    assert (budget.used_bytes, budget.free_bytes) == (60, 40)


def test_a_lease_that_ends_gives_its_bytes_back_once() -> None:
    budget = KvBudget(100)
    budget.reserve(A, 60, 0)
    budget.release(A)
    budget.release(A)
    assert budget.used_bytes == 0
    assert budget.reserve(B, 100, 0).admitted


def test_a_lease_that_is_reserved_again_is_counted_once() -> None:
    budget = KvBudget(100)
    budget.reserve(A, 60, 0)
    assert budget.reserve(A, 80, 0).admitted
    assert budget.used_bytes == 80


def test_the_least_recently_used_idle_leases_are_dropped_and_no_more_than_needed() -> None:
    budget = KvBudget(90)
    for key in (A, B, C):
        budget.reserve(key, 30, 0)
    budget.touch(A, 1)
    verdict = budget.reserve(LeaseKey(b"d" * 16, 0), 50, 1 + limits.IDLE_LEASE_S)
    assert (verdict.admitted, verdict.dropped) == (True, (B, C))
    assert budget.used_bytes == 80


def test_a_lease_that_works_is_never_dropped() -> None:
    budget = KvBudget(60)
    budget.reserve(A, 30, 0)
    budget.reserve(B, 30, 0)
    budget.touch(A, 10)
    budget.touch(B, 10)
    verdict = budget.reserve(C, 30, 11)
    assert (verdict.admitted, verdict.dropped) == (False, ())
    assert budget.used_bytes == 60


def test_what_is_larger_than_the_whole_budget_drops_nobody() -> None:
    budget = KvBudget(60)
    budget.reserve(A, 30, 0)
    assert not budget.reserve(B, 61, 100).admitted
    assert budget.used_bytes == 30


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.sampled_from("rtx")), max_size=40))
def test_the_books_balance_whatever_happens(story: list[tuple[int, int, str]]) -> None:
    budget, held = KvBudget(100), dict[LeaseKey, int]()
    for now, (who, size_bytes, what) in enumerate(story):
        key = LeaseKey(bytes([who]) * 16, 0)
        if what == "r":
            verdict = budget.reserve(key, size_bytes, now)
            held.pop(key, None)
            for dropped in verdict.dropped:
                del held[dropped]
            if verdict.admitted:
                held[key] = size_bytes
        elif what == "t":
            budget.touch(key, now)
        else:
            budget.release(key)
            held.pop(key, None)
        assert budget.used_bytes == sum(held.values()) <= 100
