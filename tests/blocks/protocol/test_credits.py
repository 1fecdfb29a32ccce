"""Credits: the smallest grant rules, whole windows are taken and given."""

from __future__ import annotations

import pytest

from blocks.protocol.credits import Credits


def test_the_smallest_grant_of_each_kind_rules() -> None:
    ring = Credits.smallest([(4, 100), (2, 300)])
    assert (ring.windows_granted, ring.bytes_granted) == (2, 100)


def test_neither_windows_nor_bytes_are_overdrawn() -> None:
    ring = Credits(2, 100)
    assert ring.take(60)
    assert not ring.take(60)
    assert ring.take(40)
    assert not ring.take(0)
    ring.give(60)
    assert ring.take(50)


def test_a_credit_that_was_never_taken_can_not_come_back() -> None:
    with pytest.raises(ValueError):
        Credits(1, 10).give(1)
