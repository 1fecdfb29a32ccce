"""Servers that owe a word."""

from __future__ import annotations

from peerd.calls.quiet import QuietServers

ONE, OTHER = b"one", b"other"


def test_a_server_is_quiet_from_when_a_word_of_any_of_its_calls_is_overdue() -> None:
    quiet = QuietServers()
    quiet.expect(ONE, b"a", 3.0)
    quiet.expect(ONE, b"b", 5.0)
    quiet.expect(OTHER, b"c", 9.0)
    assert [quiet.is_quiet(ONE, now) for now in (0.0, 3.0, 3.1, 6.0)] == [False, False, True, True]
    assert not quiet.is_quiet(OTHER, 6.0)
    assert not quiet.is_quiet(b"nobody", 6.0)


def test_a_word_that_came_ends_a_silence() -> None:
    quiet = QuietServers()
    quiet.expect(ONE, b"a", 3.0)
    quiet.expect(ONE, b"a", 7.0)
    assert not quiet.is_quiet(ONE, 6.0)


def test_a_call_that_is_over_is_waited_for_no_more() -> None:
    quiet = QuietServers()
    quiet.expect(ONE, b"a", 3.0)
    quiet.expect(ONE, b"b", 4.0)
    quiet.end(ONE, b"a")
    assert [quiet.is_quiet(ONE, now) for now in (3.5, 4.5)] == [False, True]
    quiet.end(ONE, b"b")
    quiet.end(ONE, b"b")
    assert not quiet.is_quiet(ONE, 4.5)
    assert not quiet._due, "a server without calls is kept"
