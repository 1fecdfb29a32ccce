"""Outputs within a bound, newest kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blocks.protocol.journal import Entry, Journal, JournalRoom, bound_together

from .scenes import hidden


def entry(turn: int, position: int, tokens: int = 1) -> Entry:
    return Entry(turn, position, tokens, "all", None, hidden(tokens))


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=30))
def test_bytes_and_entries_stay_within_their_bounds_and_are_counted_right(steps: list[tuple[int, bool]]) -> None:
    journal = Journal(bytes_max=160, entries_max=5)
    end = 0
    for turn, (tokens, rolls_back) in enumerate(steps, 1):
        position = max(0, end - 1) if rolls_back else end
        journal.truncate(position)
        journal.append(entry(turn, position, tokens))
        end = position + tokens
        assert journal.size_bytes == sum(kept.size_bytes for kept in journal) <= 160
        assert len(journal) <= 5
        newest = journal.answer_to(turn)
        assert newest is not None
        assert newest.end == end


def test_an_output_larger_than_the_journal_is_not_kept() -> None:
    journal = Journal(bytes_max=40, entries_max=5)
    journal.append(entry(1, 0, 2))
    journal.append(entry(2, 2, 3))
    assert journal.answer_to(2) is None
    assert journal.size_bytes == 0


def test_only_what_starts_exactly_at_a_position_covers_it() -> None:
    journal = Journal(bytes_max=1000, entries_max=5)
    journal.append(entry(1, 0, 2))
    journal.append(entry(2, 2, 2))
    assert [kept.turn for kept in journal.covering(2)] == [2]
    assert [kept.turn for kept in journal.covering(0)] == [1, 2]
    assert journal.covering(1) == ()
    assert journal.covering(4) == ()
    assert journal.first_position == 0


def test_journals_over_their_common_bound_lose_the_oldest_of_the_largest() -> None:
    room = JournalRoom()
    small, large = (Journal(bytes_max=1000, entries_max=9, room=room) for _ in range(2))
    small.append(entry(1, 0, 2))
    for turn in range(1, 6):
        large.append(entry(turn, turn - 1))
    assert room.used_bytes == small.size_bytes + large.size_bytes == 7 * 16
    bound_together([small, large], 4 * 16)
    assert [kept.turn for kept in small] == [1]
    assert [kept.turn for kept in large] == [4, 5]
    assert room.used_bytes == 4 * 16
    large.truncate(4)
    small.clear()
    assert room.used_bytes == large.size_bytes == 16
    bound_together([small, large], 0)
    assert room.used_bytes == len(large) == 0
