"""The multiplexer's machine: vectors, every move in every state, windows, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.errors import LimitExceeded, ProtocolViolation
from overlay.yamux.session import (
    CREDIT_BYTES_MAX,
    CREDIT_MAX,
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    HEADER,
    INITIAL_WINDOW,
    MOVES,
    RECEIVE_WINDOW_MAX,
    STREAMS_MAX,
    TYPE_DATA,
    TYPE_GOAWAY,
    TYPE_PING,
    TYPE_WINDOW,
    UNACKED_STREAMS_MAX,
    Lane,
    LaneState,
    Move,
    Session,
)

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["yamux"]


class Recorder:
    """Hears a session's events."""

    def __init__(self) -> None:
        self.story: list[tuple[object, ...]] = []

    def lane_opened(self, lane: Lane) -> None:
        self.story.append(("opened", lane.id))

    def lane_data(self, lane: Lane, data: memoryview) -> None:
        self.story.append(("data", lane.id, bytes(data)))

    def lane_finished(self, lane: Lane) -> None:
        self.story.append(("finished", lane.id))

    def lane_reset(self, lane: Lane) -> None:
        self.story.append(("reset", lane.id))

    def lane_window(self, lane: Lane) -> None:
        self.story.append(("window", lane.id))

    def pong(self, rtt_s: float) -> None:
        self.story.append(("pong", rtt_s))

    def mark_echoed(self, number: int) -> None:
        self.story.append(("echoed", number))

    def go_away(self, code: int) -> None:
        self.story.append(("go away", code))

    def bytes_of(self, stream: int) -> bytes:
        return b"".join(event[2] for event in self.story if event[:2] == ("data", stream))  # type: ignore[misc]


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> memoryview:
    return memoryview(HEADER.pack(0, kind, flags, stream, length) + body)


def server() -> tuple[Session, Recorder]:
    recorder = Recorder()
    return Session(recorder, client=False), recorder


def with_stream() -> tuple[Session, Recorder, Lane]:
    session, recorder = server()
    session.receive(frame(TYPE_WINDOW, FLAG_SYN, 1, 0), 0.0)
    return session, recorder, session.lanes[1]


def test_frames_are_the_vectors() -> None:
    session = Session(Recorder(), client=True)
    lane = session.open()
    assert session.poll_control().hex() == VECTORS["open 1 by window"]
    assert (session.data_header(lane, 2) + b"hi").hex() == VECTORS['data 1 "hi"']
    session.finish(lane)
    assert session.poll_control().hex() == VECTORS["fin 1"]
    session.reset(lane)
    assert session.poll_control().hex() == VECTORS["rst 1"]
    session.go_away(1)
    assert session.poll_control().hex() == VECTORS["goaway protocol error"]


def test_a_ping_is_answered_ahead_of_data_and_ours_measures() -> None:
    session, recorder = server()
    session.receive(memoryview(bytes.fromhex(VECTORS["ping syn 0"])), 0.0)
    assert session.poll_control().hex() == VECTORS["ping ack 0"]
    session.ping(1.0)
    value = HEADER.unpack(session.poll_control())[4]
    session.receive(frame(TYPE_PING, FLAG_ACK, 0, value), 1.25)
    assert recorder.story == [("pong", 0.25)]
    assert session.rtt_s == 0.25


def test_a_mark_is_echoed_as_itself_and_is_no_answer_to_a_ping() -> None:
    session, recorder = server()
    session.ping(1.0)
    session.mark(7)
    frames = session.poll_control()
    value = HEADER.unpack(frames[12:])[4]
    session.receive(frame(TYPE_PING, FLAG_ACK, 0, value), 1.25)
    assert recorder.story == [("echoed", 7)]
    assert session.ping_sent_at == 1.0


def test_an_unasked_pong_changes_nothing() -> None:
    session, recorder = server()
    session.receive(frame(TYPE_PING, FLAG_ACK, 0, 77), 0.0)
    assert recorder.story == []


@given(st.binary(min_size=1, max_size=600), st.lists(st.integers(0, 700), max_size=8))
def test_any_cut_of_bytes_tells_the_same_story(body: bytes, points: list[int]) -> None:
    wire = bytes(frame(TYPE_DATA, FLAG_SYN, 1, len(body), body)) + bytes(frame(TYPE_DATA, FLAG_FIN, 1, 0))
    session, recorder = server()
    for start, end in pairwise(sorted({0, len(wire), *(point % len(wire) for point in points)})):
        session.receive(memoryview(wire)[start:end], 0.0)
    assert recorder.bytes_of(1) == body
    assert recorder.story[0] == ("opened", 1)
    assert recorder.story[-1] == ("finished", 1)


@pytest.mark.parametrize(("state", "move"), list(product(LaneState, Move)))
def test_every_move_in_every_state_is_in_the_table_or_changes_nothing(state: LaneState, move: Move) -> None:
    session, _, lane = with_stream()
    lane.state = state
    if move is Move.SEND_FIN:
        session.finish(lane)
    elif move is Move.RECEIVE_FIN:
        session.receive(frame(TYPE_WINDOW, FLAG_FIN, 1, 0), 0.0)
    else:
        session.receive(frame(TYPE_WINDOW, FLAG_RST, 1, 0), 0.0)
    assert lane.state is MOVES.get((state, move), state)


def test_data_beyond_the_window_is_refused_before_its_body() -> None:
    session, recorder, _ = with_stream()
    with pytest.raises(ProtocolViolation):
        session.receive(frame(TYPE_DATA, 0, 1, INITIAL_WINDOW + 1), 0.0)
    assert recorder.story == [("opened", 1)]


def test_consumption_gives_credit_back_at_half_a_window_and_not_before() -> None:
    session, _, lane = with_stream()
    session.poll_control()
    session.receive(frame(TYPE_DATA, 0, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW)), 0.0)
    session.consumed(lane, INITIAL_WINDOW // 2 - 1, 100.0)
    assert not session.has_control
    session.consumed(lane, 1, 100.0)
    *_, stream, credit = HEADER.unpack(session.poll_control())
    assert (stream, credit) == (1, INITIAL_WINDOW // 2)


def test_a_window_that_is_used_up_within_a_few_round_trips_doubles() -> None:
    session, _, lane = with_stream()
    session.rtt_s = 0.1
    session.consumed(lane, INITIAL_WINDOW // 2, 10.0)
    session.poll_control()
    session.consumed(lane, INITIAL_WINDOW // 2, 10.2)
    assert lane.window_size == 2 * INITIAL_WINDOW


def test_a_large_window_gives_credit_back_long_before_half_of_it_and_does_not_grow_sooner_for_that() -> None:
    session, _, lane = with_stream()
    session.grant(lane, RECEIVE_WINDOW_MAX // 2 - INITIAL_WINDOW)
    session.poll_control()
    session.consumed(lane, CREDIT_BYTES_MAX - 1, 0.1)
    assert not session.has_control
    session.consumed(lane, 1, 0.1)
    assert HEADER.unpack(session.poll_control())[4] == CREDIT_BYTES_MAX
    assert lane.window_size == RECEIVE_WINDOW_MAX // 2


def test_credit_over_what_a_window_can_hold_is_refused() -> None:
    session, _, _ = with_stream()
    with pytest.raises(ProtocolViolation):
        session.receive(frame(TYPE_WINDOW, 0, 1, CREDIT_MAX), 0.0)


@pytest.mark.parametrize("bad", [
    frame(TYPE_DATA, FLAG_SYN, 2, 0), frame(TYPE_DATA, 0, 0, 0), frame(TYPE_DATA, 0, 99, 5),
    frame(TYPE_DATA, 16, 1, 0), frame(7, 0, 1, 0), memoryview(b"\x01" + bytes(11)),
], ids=["parity", "stream zero", "never opened", "flag", "type", "version"])  # fmt: skip
def test_what_no_peer_may_send_is_a_violation(bad: memoryview) -> None:
    session, _ = server()
    with pytest.raises(ProtocolViolation):
        session.receive(bad, 0.0)


def test_frames_for_a_stream_that_ended_are_dropped_and_their_bytes_skipped() -> None:
    session, recorder, lane = with_stream()
    session.reset(lane)
    session.receive(frame(TYPE_DATA, 0, 1, 3, b"abc"), 0.0)
    session.receive(frame(TYPE_WINDOW, 0, 1, 9), 0.0)
    session.receive(frame(TYPE_DATA, FLAG_SYN, 3, 2, b"ok"), 0.0)
    assert recorder.story[1:] == [("opened", 3), ("data", 3, b"ok")]


def test_ten_thousand_opened_streams_stay_bounded() -> None:
    session, _ = server()
    for stream in range(1, 20_001, 2):
        session.receive(frame(TYPE_WINDOW, FLAG_SYN, stream, 0), 0.0)
    assert len(session.lanes) == STREAMS_MAX
    refused = [HEADER.unpack_from(session.poll_control())[2]]
    assert refused == [FLAG_RST]


def test_streams_are_announced_in_the_order_of_their_ids_whatever_is_sent_first() -> None:
    """A regression: data of a later, more urgent stream overtook an earlier one's SYN, which a peer takes for forgery."""
    ours = Session(Recorder(), client=True)
    first, second = ours.open(), ours.open()
    wire = ours.poll_control() + ours.data_header(second, 1) + b"2" + ours.data_header(first, 1) + b"1"
    theirs, recorder = server()
    theirs.receive(memoryview(wire), 0.0)
    assert recorder.story == [("opened", 1), ("opened", 3), ("data", 3, b"2"), ("data", 1, b"1")]


def test_unacknowledged_streams_are_bounded_until_the_peer_answers() -> None:
    session = Session(Recorder(), client=True)
    lanes = [session.open() for _ in range(UNACKED_STREAMS_MAX)]
    with pytest.raises(LimitExceeded):
        session.open()
    session.receive(frame(TYPE_WINDOW, FLAG_ACK, lanes[0].id, 0), 0.0)
    session.open()


def test_after_go_away_no_stream_is_opened() -> None:
    session = Session(recorder := Recorder(), client=True)
    session.receive(frame(TYPE_GOAWAY, 0, 0, 0), 0.0)
    assert recorder.story == [("go away", 0)]
    with pytest.raises(LimitExceeded):
        session.open()


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 31), st.integers(0, 6), st.integers(0, 2**32 - 1)), max_size=20
    )
)
def test_any_run_of_headers_is_taken_or_refused(headers: list[tuple[int, int, int, int]]) -> None:
    session, _ = server()
    try:
        for kind, flags, stream, length in headers:
            session.receive(frame(kind, flags, stream, length), 0.0)
            session.poll_control()
    except ProtocolViolation:
        return
    assert all(lane.receive_window >= 0 for lane in session.lanes.values())
