"""How much bulk is under way beside urgent messages: the window against a path that is one queue and one delay."""

from __future__ import annotations

from collections import deque

import pytest

from overlay.limits import URGENT_LIFE_S
from overlay.pacing import MARK_AGAIN_S, MARK_MIN_BYTES, WINDOW_MIN_BYTES, Pacer, UrgentTraffic

PIECE_BYTES = 4096
STEP_S = 0.001
WAIT_MAX_S = 0.06


class Path:
    """A bottleneck of ``rate`` with an endless queue, then a round trip of ``rtt_s``; a writer who always has more to send."""

    def __init__(self, rate: float, rtt_s: float) -> None:
        self.rate, self.rtt_s = rate, rtt_s
        self.now = 0.0
        self.position = 0
        self.free_at = 0.0
        self.pacer = Pacer()
        self._echoes: deque[tuple[float, int]] = deque()
        self.waits: list[float] = []

    def write(self, count: int) -> None:
        self.position += count
        self.free_at = max(self.free_at, self.now) + count / self.rate

    def step(self) -> None:
        self.now += STEP_S
        while self._echoes and self._echoes[0][0] <= self.now:
            self.pacer.echoed(self._echoes.popleft()[1], self.position, self.now)
        for _ in range(1000):
            if self.pacer.wants_mark(self.position, self.now):
                number = self.pacer.mark(self.position, self.now)
                self._echoes.append((max(self.free_at, self.now) + self.rtt_s, number))
            if not self.pacer.room(self.position):
                break
            self.write(PIECE_BYTES)
        self.waits.append(max(0.0, self.free_at - self.now))

    def run(self, seconds: float) -> float:
        """Bytes a second written meanwhile."""
        began, self.waits = self.position, []
        for _ in range(round(seconds / STEP_S)):
            self.step()
        return (self.position - began) / seconds


PATHS = [(mbit, rtt_s) for mbit in (5, 20, 100) for rtt_s in (0.002, 0.04, 0.1)] + [(20, 0.2), (1000, 0.02)]


@pytest.mark.parametrize(("mbit", "rtt_s"), PATHS)
def test_bulk_takes_most_of_the_uplink_and_little_waits(mbit: float, rtt_s: float) -> None:
    path = Path(mbit * 125_000, rtt_s)
    path.pacer.begin(0, 0.0, None, is_full=False)
    path.run(60 * rtt_s + 2)
    assert path.run(max(0.3, 20 * rtt_s)) > 0.75 * path.rate
    assert sorted(path.waits)[len(path.waits) * 95 // 100] < WAIT_MAX_S


def test_what_was_written_without_count_has_to_arrive_first() -> None:
    path = Path(2_500_000, 0.04)
    path.write(500_000)  # 200 ms of the uplink
    path.pacer.begin(path.position, 0.0, 0.04, is_full=True)
    path.run(0.23)
    assert path.position == 500_000
    path.run(0.1)
    assert path.position > 500_000


def test_the_window_follows_an_uplink_that_becomes_slower() -> None:
    path = Path(12_500_000, 0.04)
    path.pacer.begin(0, 0.0, None, is_full=False)
    path.run(3)
    path.rate = 1_250_000
    path.run(3)
    assert path.run(2) > 0.85 * path.rate
    assert max(path.waits) < WAIT_MAX_S


def test_a_path_that_becomes_longer_is_taken_for_what_it_is() -> None:
    path = Path(2_500_000, 0.02)
    path.pacer.begin(0, 0.0, None, is_full=False)
    path.run(2)
    path.rtt_s = 0.1
    path.run(6)
    assert path.run(2) > 0.8 * path.rate


def test_a_window_that_is_not_used_does_not_grow() -> None:
    pacer = Pacer()
    pacer.begin(0, 0.0, None, is_full=False)
    first = pacer.window
    for turn in range(1, 50):
        pacer.echoed(pacer.mark(turn * 1000, float(turn)), turn * 1000, turn + 0.05)
    assert pacer.window == first


def test_an_echo_confirms_the_marks_before_it_and_an_unknown_one_nothing() -> None:
    pacer = Pacer()
    pacer.begin(0, 0.0, None, is_full=False)
    full = pacer.room(0)
    pacer.mark(10_000, 0.0)
    second = pacer.mark(20_000, 0.1)
    pacer.echoed(12345, 20_000, 0.2)
    assert pacer.room(20_000) == full - 20_000
    pacer.echoed(second, 20_000, 0.2)
    assert pacer.room(20_000) == pacer.window


def test_an_echo_that_was_lost_is_asked_for_again() -> None:
    pacer = Pacer()
    pacer.begin(0, 0.0, None, is_full=False)
    assert pacer.wants_mark(MARK_MIN_BYTES, 0.0)
    pacer.mark(MARK_MIN_BYTES, 0.0)
    assert not pacer.wants_mark(MARK_MIN_BYTES, MARK_AGAIN_S)
    assert pacer.wants_mark(MARK_MIN_BYTES, MARK_AGAIN_S + 0.1)


def test_the_window_is_never_smaller_than_its_least() -> None:
    path = Path(20_000, 0.04)
    path.pacer.begin(0, 0.0, None, is_full=False)
    path.run(10)
    assert path.pacer.window >= WINDOW_MIN_BYTES
    assert path.run(5) > 0.8 * path.rate


def test_urgent_traffic_is_expected_for_a_while_after_the_last() -> None:
    urgent = UrgentTraffic()
    assert not urgent.is_live(0.0)
    urgent.last_at = 10.0
    assert urgent.is_live(10.0 + URGENT_LIFE_S - 0.1)
    assert not urgent.is_live(10.0 + URGENT_LIFE_S)
