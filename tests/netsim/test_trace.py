from __future__ import annotations

from netsim.trace import BATCH_LINES, LINES_PER_STORY, SESSIONS_AT_MOST, TALK_PER_STORY, Trace


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now(self) -> float:
        return self.at_s


def traced(lines: int, *, last: str = "x") -> str:
    trace = Trace(Hand().now)
    for index in range(lines):
        trace.add("sent", "a", str(index))
    trace.add("sent", "a", last)
    return trace.hexdigest()


def test_equal_events_give_equal_hashes_and_one_different_word_another() -> None:
    assert traced(3 * BATCH_LINES) == traced(3 * BATCH_LINES)
    assert traced(3 * BATCH_LINES) != traced(3 * BATCH_LINES, last="y")


def test_when_the_hash_is_asked_for_changes_nothing() -> None:
    asked, unasked = Trace(Hand().now), Trace(Hand().now)
    for trace in (asked, unasked):
        trace.add("a", "b", "c")
        if trace is asked:
            trace.hexdigest()
        trace.add("d", "e", "f")
    assert asked.hexdigest() == unasked.hexdigest()
    assert asked.lines == unasked.lines == 2


def test_the_same_event_at_another_time_is_another() -> None:
    hand = Hand()
    early, late = Trace(hand.now), Trace(hand.now)
    early.add("a", "b", "c")
    hand.at_s += 1e-9
    late.add("a", "b", "c")
    assert early.hexdigest() != late.hexdigest()


def test_notes_are_told_and_not_hashed() -> None:
    trace, silent = Trace(Hand().now), Trace(Hand().now)
    trace.note("a", "an object at 0x7f00deadbeef\nspoke")
    assert trace.hexdigest() == silent.hexdigest()
    assert trace.story("a") == ("    0.000000  note a an object at 0x... | spoke",)


def test_a_story_has_the_last_lines_of_a_host_or_a_session_in_seconds_of_the_run() -> None:
    hand = Hand()
    trace = Trace(hand.now)
    for index in range(LINES_PER_STORY + 5):
        hand.at_s = 1000.0 + index
        trace.add("ask", "home-1", str(index), session="s1" if index % 2 else "")
    assert len(trace.story("home-1")) == LINES_PER_STORY
    assert trace.story("home-1")[-1].split() == [
        f"{LINES_PER_STORY + 4}.000000",
        "ask",
        "home-1",
        str(LINES_PER_STORY + 4),
    ]
    assert [line.split()[-1] for line in trace.story("s1")][:2] == ["1", "3"]
    assert trace.story("nobody") == ()


def test_of_too_many_sessions_the_longest_silent_are_forgotten() -> None:
    trace = Trace(Hand().now)
    trace.add("ask", "a", "first", session="first")
    trace.add("ask", "a", "second", session="second")
    trace.add("ask", "a", "again", session="first")
    for index in range(SESSIONS_AT_MOST - 1):
        trace.add("ask", "a", "x", session=f"s{index}")
    assert trace.story("second") == ()
    assert len(trace.story("first")) == 2


def test_a_listener_hears_lines_and_notes() -> None:
    trace, heard = Trace(Hand().now), []
    trace.listener = heard.append
    trace.add("a", "b", "c")
    trace.note("b", "d")
    assert heard == ["1000.0 a b c", "1000.0 note b d"]


def test_after_the_run_nothing_is_heard() -> None:
    trace = Trace(Hand().now)
    trace.add("a", "b", "c")
    before = trace.hexdigest()
    trace.close()
    trace.add("a", "b", "d")
    assert trace.hexdigest() == before
    assert len(trace.story("b")) == 1


def test_bytes_on_the_wire_do_not_drown_what_else_happened_to_a_host() -> None:
    hand = Hand()
    trace = Trace(hand.now)
    trace.add("fault", "a", "kill")
    for _ in range(10 * LINES_PER_STORY):
        hand.at_s += 1
        trace.data("a", "b", 5, 0)
    hand.at_s += 1
    trace.add("fault", "a", "start 2")
    story = trace.story("a")
    assert len(story) == TALK_PER_STORY + 2
    assert (story[0].split()[1:], story[-1].split()[1:]) == (["fault", "a", "kill"], ["fault", "a", "start", "2"])


def test_a_line_of_bytes_is_told_in_words_and_hashed_with_its_checksum() -> None:
    one, other = Trace(Hand().now), Trace(Hand().now)
    heard: list[str] = []
    one.listener = heard.append
    one.data("a", "b", 5, 0xABC)
    other.data("a", "b", 5, 0xABD)
    assert one.hexdigest() != other.hexdigest()
    assert heard == ["1000.0 data a b 5 00000abc"]
    assert one.story("a") == ("    0.000000  data a b 5 00000abc",)


def test_words_that_move_between_the_fields_of_a_line_give_another_hash() -> None:
    digests = []
    for line in (("a", "b", "c d"), ("a", "b c", "d"), ("a", "c", "b d")):
        trace = Trace(Hand().now)
        trace.add(*line)
        digests.append(trace.hexdigest())
    assert len(set(digests)) == 3


def test_the_story_of_nobody_is_what_befell_hosts_and_failed_last_in_the_whole_run() -> None:
    trace = Trace(Hand().now)
    trace.add("fault", "a", "kill")
    trace.add("looked", "a", "nothing found")
    trace.note("b", "only b's own")
    trace.note("b", "FAILED", of_the_run=True)
    trace.add("run", "", "the time is over")
    assert [line.split(maxsplit=1)[1] for line in trace.story("")] == [
        "fault a kill",
        "note b FAILED",
        "run  the time is over",
    ]
    assert len(trace.story("b")) == 2
