"""Events from bytes, however they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.client import BadAnswer
from peerd.client.sse import COMMENT, DATA, EVENT_BYTES_MAX, EventParser

STREAM = 'data: {"a": "é"}\n\n: waiting for blocks\n\ndata: one\ndata:two\r\n\r\n: \n\nevent: x\nid: 3\n\ndata: [DONE]\n\n'.encode()
EVENTS = [(DATA, '{"a": "é"}'), (COMMENT, "waiting for blocks"), (DATA, "one\ntwo"), (COMMENT, ""), (DATA, "[DONE]")]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_cut_of_the_bytes_gives_the_same_events(cuts: list[int]) -> None:
    parser = EventParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [event for start, end in pairwise(edges) for event in parser.feed(STREAM[start:end])]
    assert found == EVENTS


def test_an_event_without_end_is_refused() -> None:
    parser = EventParser()
    for _ in range(EVENT_BYTES_MAX // 1_000_000):
        parser.feed(b"x" * 1_000_000)
    with pytest.raises(BadAnswer, match="too large"):
        parser.feed(b"x" * 1_000_000)


def test_many_events_don_t_add_up_to_a_large_one() -> None:
    parser = EventParser()
    piece = b"data: " + b"x" * 1_000_000 + b"\n\n"
    assert sum(len(parser.feed(piece)) for _ in range(EVENT_BYTES_MAX // 1_000_000 + 2)) == 18
