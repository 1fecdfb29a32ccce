"""Which long answers may go: as many as leave in a moment, whoever asks, and one now and then whatever is under way."""

from __future__ import annotations

from overlay.dht import limits
from overlay.dht.under_way import AnswersUnderWay

LONG = limits.LONG_ANSWER_BYTES
PAGE = 128 << 10


def asker(number: int) -> bytes:
    return number.to_bytes(4, "big")


def filled(now: float = 0.0) -> AnswersUnderWay:
    """As much is under way as may be, to askers from 0 on."""
    under_way = AnswersUnderWay()
    while not under_way.later_s(asker(len(under_way)), PAGE, now):
        under_way.began(asker(len(under_way)), PAGE, now)
    return under_way


def test_answers_go_until_as_much_is_under_way_as_leaves_in_a_moment() -> None:
    under_way = filled()
    assert len(under_way) * PAGE == limits.UNDER_WAY_BYTES
    assert under_way.put_off == 1


def test_short_answers_always_go() -> None:
    under_way = filled()
    assert under_way.later_s(asker(99), LONG - 1, 0.0) == 0.0
    assert under_way.later_s(asker(99), LONG, 0.0) > 0.0


def test_the_last_that_goes_may_be_as_long_as_it_likes_for_else_newcomers_would_wait_for_ever() -> None:
    under_way = AnswersUnderWay()
    under_way.began(asker(0), limits.UNDER_WAY_BYTES - 1, 0.0)
    assert under_way.later_s(asker(1), limits.PAGE_BYTES, 0.0) == 0.0


def test_what_arrived_makes_room() -> None:
    under_way = AnswersUnderWay()
    first = under_way.began(asker(0), limits.UNDER_WAY_BYTES, 0.0)
    assert under_way.later_s(asker(1), PAGE, 0.1) > 0.0
    under_way.ended(first, 0.1, has_arrived=True)
    assert under_way.later_s(asker(1), PAGE, 0.1) == 0.0
    assert len(under_way) == 0


def test_where_answers_arrive_fast_more_are_under_way_and_after_a_pause_no_more_than_before() -> None:
    under_way = AnswersUnderWay()
    for number in range(100):  # 12.5 MiB in a second
        now = number / 100
        under_way.ended(under_way.began(asker(number), PAGE, now), now, has_arrived=True)
    for number in range(limits.LONG_ANSWERS_MAX - 1):
        assert under_way.later_s(asker(number), PAGE, 1.0) == 0.0
        under_way.began(asker(number), PAGE, 1.0)
    assert under_way.later_s(asker(99), PAGE, 1.0 + limits.LONG_ANSWER_EVERY_S / 2) == 0.0
    assert under_way.later_s(asker(99), PAGE, 4.0 + limits.LONG_ANSWER_EVERY_S / 2) == 0.0, "none went for so long"
    under_way.began(asker(99), PAGE, 4.0)
    assert under_way.later_s(asker(98), PAGE, 4.0) > 0.0


def test_what_did_not_arrive_says_nothing_of_the_uplink() -> None:
    under_way = AnswersUnderWay()
    for number in range(100):
        under_way.ended(under_way.began(asker(number), PAGE, 0.0), 0.0, has_arrived=False)
    under_way.began(asker(0), limits.UNDER_WAY_BYTES, 0.0)
    assert under_way.later_s(asker(1), PAGE, 0.0) > 0.0


def test_no_more_go_at_once_than_connections_are_held_for() -> None:
    under_way = AnswersUnderWay()
    for number in range(limits.LONG_ANSWERS_MAX):
        assert under_way.later_s(asker(number), LONG, 0.0) == 0.0
        under_way.began(asker(number), LONG, 0.0)
    assert under_way.later_s(asker(99), LONG, 0.0) > 0.0


def test_one_asker_has_its_part_and_others_theirs() -> None:
    under_way = AnswersUnderWay()
    for _ in range(limits.LONG_ANSWERS_PER_ASKER):
        under_way.began(asker(0), LONG, 0.0)
    assert under_way.later_s(asker(0), LONG, 0.0) > 0.0
    assert under_way.later_s(asker(1), LONG, 0.0) == 0.0


def test_one_goes_now_and_then_whatever_is_under_way_but_not_to_who_has_one() -> None:
    under_way = filled()
    later = limits.LONG_ANSWER_EVERY_S
    assert under_way.later_s(asker(99), PAGE, later * 0.9) > 0.0
    assert under_way.later_s(asker(0), PAGE, later) > 0.0
    assert under_way.later_s(asker(99), PAGE, later) == 0.0
    under_way.began(asker(99), PAGE, later)
    assert under_way.later_s(asker(98), PAGE, later * 1.9) > 0.0


def test_askers_are_told_to_wait_as_long_as_it_takes_within_bounds_and_not_all_as_long() -> None:
    under_way = AnswersUnderWay()
    under_way.began(asker(0), 3 * limits.UNDER_WAY_BYTES // 2, 0.0)
    waits = [under_way.later_s(asker(number), PAGE, 0.0) for number in range(1, 21)]
    assert min(waits) >= 0.75 * 1.5
    assert max(waits) <= limits.LATER_MAX_S
    assert len(set(waits)) > 10
    under_way.began(asker(0), 50 * limits.UNDER_WAY_BYTES, 0.0)
    assert under_way.later_s(asker(99), PAGE, 0.0) == limits.LATER_MAX_S
    assert filled().later_s(asker(99), PAGE, 0.0) >= limits.LATER_MIN_S
