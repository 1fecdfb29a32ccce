"""One direction of a TCP connection, against numbers computed by hand."""

from __future__ import annotations

import math
import random

import pytest

from netsim.flow import (
    FIN,
    RETRIES_MAX,
    SEGMENT_BYTES,
    Card,
    Flow,
    Loss,
    first_lost,
    repeated_losses,
    segments_of,
)

RTT_S = 0.125
WINDOW = 6 << 20


def flow_of(count: int, card: Card | None = None) -> Flow:
    flow = Flow(card or Card())
    flow.queue(bytes(count))
    return flow


def flight(flow: Flow, now: float, window: int = WINDOW) -> int:
    """All that may leave now; acknowledged a round trip later. Gives its segments."""
    segments = 0
    while (payload := flow.release(now, SEGMENT_BYTES, window)) is not None:
        flow.on_wire_bytes -= len(payload)
        flow.acknowledge(now + RTT_S, 1, now)
        segments += 1
    return segments


def warmed(rounds: int, now: float = 1.0) -> tuple[Flow, float]:
    """A flow that always had more to send, for so many round trips without a loss."""
    flow = Flow(Card())
    for _ in range(rounds):
        flow.queue(bytes(1000 * SEGMENT_BYTES))
        flight(flow, now)
        now += RTT_S
    flow.unsent.clear()
    flow.unsent_bytes = 0
    return flow, now


def test_a_cold_burst_of_70_kb_takes_three_round_trips() -> None:
    flow = flow_of(70_000)
    assert [flight(flow, 1.0 + number * RTT_S) for number in range(4)] == [10, 20, 18, 0]


def test_the_same_burst_on_a_warm_connection_takes_one() -> None:
    flow, now = warmed(4)
    flow.queue(bytes(70_000))
    assert [flight(flow, now), flight(flow, now + RTT_S)] == [48, 0]


def test_the_window_doubles_each_round_trip_and_grows_only_while_it_is_the_limit() -> None:
    flow = flow_of(10_000_000)
    assert [flight(flow, 1.0 + number * RTT_S) for number in range(6)] == [10, 20, 40, 80, 160, 320]
    idle = Flow(Card())
    now = 1.0
    for _ in range(100):
        idle.queue(bytes(SEGMENT_BYTES))
        flight(idle, now)
        now += RTT_S
    assert idle.window == 10


def test_after_idle_time_outs_the_window_halves_for_each_down_to_the_initial_one() -> None:
    flow, now = warmed(6)  # 10, 20 ... 320 left, and are acknowledged now
    assert flow.rto_s == pytest.approx(RTT_S + 0.2, rel=0.02)
    flow.queue(bytes(SEGMENT_BYTES))
    flight(flow, now)
    assert flow.window == 640
    last = now
    for timeouts, window in ((0.9, 640), (2.5, 160), (100.0, 10)):
        flow, _ = warmed(6)
        flow.queue(bytes(SEGMENT_BYTES))
        flight(flow, last)
        flow.queue(bytes(SEGMENT_BYTES))
        flight(flow, last + timeouts * flow.rto_s)
        assert flow.window == window, timeouts


def test_above_the_threshold_the_window_grows_a_segment_a_round_trip() -> None:
    flow = flow_of(10_000_000)
    flow.ssthresh = 20
    assert [flight(flow, 1.0 + number * RTT_S) for number in range(5)] == [10, 20, 21, 22, 23]


def test_a_loss_that_is_noticed_costs_a_round_trip_and_half_of_the_window_and_several_in_one_window_count_once() -> (
    None
):
    flow, now = warmed(4)
    flow.queue(bytes(200 * SEGMENT_BYTES))
    assert flow.recovery(10, 0, 0, RTT_S) == (RTT_S, Loss.NOTICED)
    flow.count_acks(now)
    assert flow.window == 160
    flow.acknowledge(now, 1, now - RTT_S, Loss.NOTICED)
    flow.acknowledge(now + 0.01, 1, now - RTT_S, Loss.NOTICED)
    flow.count_acks(now + 0.01)
    assert (flow.window, flow.ssthresh) == (80, 80)


def test_the_loss_of_the_tail_costs_a_time_out_and_the_window() -> None:
    flow, now = warmed(4)
    flow.count_acks(now)
    late, loss = flow.recovery(1, 0, 0, RTT_S)
    assert late == pytest.approx(RTT_S + 0.2, rel=0.03)
    assert loss is Loss.TIMED_OUT
    twice, _ = flow.recovery(1, 0, 1, RTT_S)
    assert twice == pytest.approx(3 * late)
    flow.acknowledge(now + late, 1, now, loss)
    flow.count_acks(now + late)
    assert (flow.window, flow.ssthresh) == (1, 80)


def test_losses_come_as_often_as_the_path_says() -> None:
    draws = random.Random(5)
    lost = [first_lost(8, 0.01, draws.random()) for _ in range(100_000)]
    share = sum(index is not None for index in lost) / len(lost)
    assert share == pytest.approx(1 - 0.99**8, rel=0.05)
    assert {index for index in lost if index is not None} == set(range(8))
    again = [repeated_losses(0.1, draws.random()) for _ in range(100_000)]
    assert sum(count >= 1 for count in again) / len(again) == pytest.approx(0.1, rel=0.05)
    assert sum(count >= 2 for count in again) / len(again) == pytest.approx(0.01, rel=0.2)


def test_throughput_under_loss_is_near_the_formula_of_mathis() -> None:
    """MSS/RTT * 1.22/sqrt(p), each flight drawn segment by segment."""
    flow, draws, now, sent, loss = Flow(Card()), random.Random(3), 1.0, 0, 0.01
    rounds = 5_000
    for _ in range(rounds):
        if flow.unsent_bytes < 1_000_000:
            flow.queue(bytes(1_000_000))
        while (payload := flow.release(now, SEGMENT_BYTES, WINDOW)) is not None:
            flow.on_wire_bytes -= len(payload)
            met = Loss.NOTICED if first_lost(1, loss, draws.random()) is not None else Loss.NONE
            flow.acknowledge(now + RTT_S, 1, now, met)
            sent += 1
        now += RTT_S
    mathis = 1.22 / math.sqrt(loss)
    assert mathis / 1.5 < sent / rounds < mathis * 1.5


def test_the_receivers_window_and_the_send_buffer_bound_what_is_in_flight() -> None:
    flow = flow_of(10_000_000)
    flow.window = 10_000
    left = 0
    while (payload := flow.release(1.0, 64 << 10, 1 << 20)) is not None:
        left += len(payload)
    assert left == 1 << 20
    small = flow_of(10_000_000, Card(send_buffer_bytes=100 * SEGMENT_BYTES))
    small.window = 10_000
    assert flight(small, 1.0) == 100
    assert not small.is_limited


def test_the_kernel_takes_so_much_unsent_and_wakes_a_writer_when_half_of_it_left() -> None:
    flow = Flow(Card(notsent_lowat_bytes=10_000))
    flow.queue(bytes(10_000))
    assert (flow.room, flow.is_writable) == (0, False)
    flow.release(1.0, 4_000, WINDOW)
    assert (flow.room, flow.is_writable) == (4_000, False)
    flow.release(1.0, 2_000, WINDOW)
    assert (flow.room, flow.is_writable) == (6_000, True)


def test_a_small_write_takes_a_whole_segment_of_the_window() -> None:
    flow = Flow(Card())
    for _ in range(11):
        flow.queue(b"x")
        flow.release(1.0, 1, WINDOW)
    assert (flow.in_flight, flow.unsent_bytes) == (10, 1)


def test_what_was_swallowed_is_sent_again_first_and_each_time_out_doubles_the_next() -> None:
    flow, now = warmed(3)
    flow.count_acks(now)
    first_rto = flow.rto_s
    flow.queue(b"first")
    flow.queue(b"second")
    for payload in (flow.release(now, 5, WINDOW), flow.release(now, 6, WINDOW)):
        assert payload is not None
        flow.on_wire_bytes -= len(payload)
        flow.swallowed(payload, now)
    flow.queue(b"third")
    assert flow.is_stuck
    rtos = []
    for _ in range(RETRIES_MAX):
        assert flow.timed_out()
        rtos.append(flow.rto_s)
        payload = flow.release(now, SEGMENT_BYTES, WINDOW)
        assert bytes(payload) == b"firstsecondthird"  # type: ignore[arg-type]
        assert flow.release(now, SEGMENT_BYTES, WINDOW) is None
        flow.on_wire_bytes -= 16
        flow.swallowed(payload, now)  # type: ignore[arg-type]
    assert rtos[:3] == [pytest.approx(first_rto * 2**count) for count in (1, 2, 3)]
    assert rtos[-1] == 120.0
    assert not flow.timed_out()


def test_an_answer_after_time_outs_ends_the_doubling_and_begins_slowly() -> None:
    flow, now = warmed(5)
    flow.count_acks(now)
    flow.queue(bytes(100 * SEGMENT_BYTES))
    sent = []
    while (payload := flow.release(now, SEGMENT_BYTES, WINDOW)) is not None:
        flow.on_wire_bytes -= len(payload)
        sent.append(payload)
    for payload in sent:
        flow.swallowed(payload, now)
    assert flow.timed_out()
    assert flow.ssthresh == 50
    assert [flight(flow, now + 1 + number * RTT_S) for number in range(7)] == [1, 2, 4, 8, 16, 32, 37]
    assert flow.backoffs == 0


def test_acknowledgements_that_dont_come_back_are_made_up_for_by_the_next_one() -> None:
    flow = flow_of(5 * SEGMENT_BYTES)
    for _ in range(5):
        assert flow.release(1.0, SEGMENT_BYTES, WINDOW)
        flow.unanswered(1, 1.0)
    assert (flow.in_flight, flow.is_stuck) == (5, True)
    flow.acknowledge(2.0, 0, 1.9)
    flow.count_acks(2.0)
    assert (flow.in_flight, flow.is_stuck) == (0, False)


def test_the_end_leaves_after_the_last_byte_and_is_sent_again_when_it_was_lost() -> None:
    flow = flow_of(3)
    flow.fin_wanted = True
    assert flow.release(1.0, 100, WINDOW) == bytes(3)
    assert flow.release(1.0, 100, WINDOW) is FIN
    assert flow.release(1.0, 100, WINDOW) is None
    flow.swallowed(FIN, 1.0)
    assert flow.timed_out()
    assert flow.release(2.0, 100, WINDOW) is FIN
    assert segments_of(0) == 1


def test_chunks_are_the_bytes_in_their_order_however_they_were_written() -> None:
    draws = random.Random(11)
    flow, written, taken, now = Flow(Card()), bytearray(), bytearray(), 1.0
    flow.window = 1 << 20
    for _ in range(2_000):
        piece = draws.randbytes(draws.randrange(1, 3_000))
        written += piece
        flow.queue(piece)
        while draws.random() < 0.5:
            payload = flow.release(now, draws.randrange(1, 5_000), WINDOW)
            if payload is None:
                break
            flow.on_wire_bytes -= len(payload)
            taken += bytes(payload)  # type: ignore[arg-type]
    while (payload := flow.release(now, 1 << 20, WINDOW)) is not None:
        flow.on_wire_bytes -= len(payload)
        taken += bytes(payload)  # type: ignore[arg-type]
    assert taken == written
