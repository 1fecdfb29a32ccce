"""How much bulk one connection may have under way while small urgent messages share the uplink. Pure.

Owns one window, in bytes between the socket's near end and the peer's mux, whatever lies between them: the kernel's buffer, a modem's
queue, the path. *Marks* (pings with numbers of their own) say when bytes have arrived: a mark's echo confirms all that was written
before it, and its round trip tells the delay that an urgent message meets now. The window follows "FAST TCP" (Wei, Jin, Low, Hegde,
2006): once a round it becomes window * (base + target) / round trip, so that what waits anywhere on the way settles at a few
milliseconds of the rate; while it is small it doubles, until something waits. Must not know streams, frames or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from overlay.limits import URGENT_LIFE_S

TARGET_S = (0.008, 0.02)
"""What bulk may add to the way of an urgent message: as much as `TARGET_BYTES` take, within these."""
TARGET_BYTES = 128 << 10
"""What the queues of small modems bear."""
WINDOW_FIRST_BYTES = 32 << 10
DOUBLING_BYTES_MAX = 128 << 10
"""What overshoots by more than this overflows small modems' queues, and loss costs more than a slow start."""
WINDOW_MIN_BYTES = 8 << 10
WINDOW_MAX_BYTES = 64 << 20
MARKS_PER_WINDOW = 8
MARKS_MAX = 64
NUMBERS = (1 << 30) - 1
"""The pacer's; the bit above is for other marks."""
MARK_MIN_BYTES = 8 << 10
MARK_AGAIN_S = 1.0
"""A peer may lose an echo among others; the next one confirms as much."""
SHRINK_MAX = 0.5
RATE_KEPT = 0.98
"""Of the rate in a round that showed less: the writer may have had nothing to send."""
ROUNDS_AT_LEAST = 3
"""At the smallest window for so many rounds, what still waits isn't ours: the path has become longer."""


class UrgentTraffic:
    """Whether a host has urgent messages to send these seconds; all its connections share it, as they share the uplink."""

    __slots__ = ("last_at",)

    def __init__(self) -> None:
        self.last_at: float | None = None
        """When the last urgent bytes left."""

    def is_live(self, now: float) -> bool:
        """Whether more of them are to be expected."""
        return self.last_at is not None and now - self.last_at < URGENT_LIFE_S


@dataclass(frozen=True, slots=True)
class _Mark:
    number: int
    position: int
    sent_at: float


class Pacer:
    """One connection's. Positions are bytes written to the socket since it was opened."""

    def __init__(self) -> None:
        self.window = WINDOW_FIRST_BYTES
        self.rate: float | None = None
        """Bytes a second that the way carries: measured in rounds in which something waited on it."""
        self.base_s: float | None = None
        """The shortest round trip of a mark: the path, with nothing waiting on it."""
        self._marks: list[_Mark] = []  # a few; an idle deque takes 0.7 KiB
        self._next_number = 0
        self._marked = 0
        self._marked_at = 0.0
        self._confirmed = 0
        self._is_emptying = False
        self._is_doubling = True
        self._was_limit = False
        self._round_end = 0
        self._round_began_at = 0.0
        self._round_confirmed = 0
        self._round_trips: list[float] = []
        self._rounds_at_least = 0

    def begin(self, position: int, now: float, base_s: float | None, *, is_full: bool) -> None:
        """Urgent messages share the uplink from now on. ``is_full``: bulk waits until what was written without count has arrived."""
        self._marks.clear()
        self._is_emptying = is_full
        self._marked = self._confirmed = position
        self._start_round(position, now)
        if base_s is not None and (self.base_s is None or base_s < self.base_s):
            self.base_s = base_s

    def room(self, position: int) -> int:
        """Bytes of bulk that may be written now."""
        room = 0 if self._is_emptying else self.window - (position - self._confirmed)
        if room <= 0:
            self._was_limit = True
        return max(0, room)

    def wants_mark(self, position: int, now: float) -> bool:
        """Whether a mark should follow what was written."""
        if self._is_emptying and not self._marks:
            return True
        if len(self._marks) >= MARKS_MAX:
            return False
        if position - self._marked >= max(MARK_MIN_BYTES, self.window // MARKS_PER_WINDOW):
            return True
        if position == self._confirmed:
            return False
        return not self._marks or now - self._marked_at > MARK_AGAIN_S

    def mark(self, position: int, now: float) -> int:
        """The number of a mark that leaves now, after ``position`` bytes."""
        self._next_number = (self._next_number + 1) & NUMBERS
        self._marks.append(_Mark(self._next_number, position, now))
        self._marked, self._marked_at = position, now
        return self._next_number

    def echoed(self, number: int, position: int, now: float) -> None:
        """A mark's echo came; ``position`` bytes are written by now. An unknown number changes nothing."""
        mark = next((found for found in self._marks if found.number == number), None)
        if mark is None:
            return
        del self._marks[: self._marks.index(mark) + 1]
        if self._is_doubling and self._was_limit and not self._is_emptying:
            self.window = min(DOUBLING_BYTES_MAX, self.window + mark.position - self._confirmed)
            self._is_doubling = self.window < DOUBLING_BYTES_MAX
        self._confirmed = mark.position
        trip_s = max(now - mark.sent_at, 1e-6)
        if self._is_emptying:
            self._is_emptying = False
            self._start_round(position, now)
            self.base_s = trip_s if self.base_s is None else min(self.base_s, trip_s)
            return
        self.base_s = trip_s if self.base_s is None else min(self.base_s, trip_s)
        self._round_trips.append(trip_s)
        if mark.position >= self._round_end:
            self._end_round(now)
            self._start_round(position, now)

    def _start_round(self, position: int, now: float) -> None:
        self._round_end, self._round_began_at, self._round_confirmed = position, now, self._confirmed
        self._round_trips = []
        self._was_limit = False

    def _end_round(self, now: float) -> None:
        trip_s, base_s = sum(self._round_trips) / len(self._round_trips), self.base_s
        assert base_s is not None, "an echo was counted in this round"
        target_s = min(TARGET_S[1], max(TARGET_S[0], TARGET_BYTES * trip_s / self.window))
        if trip_s - base_s > target_s / 2:
            self._is_doubling = False
            if self._was_limit and now > self._round_began_at:
                sample = (self._confirmed - self._round_confirmed) / (now - self._round_began_at)
                self.rate = max(sample, RATE_KEPT * (self.rate or 0.0))
        factor = 1.0 if self._is_doubling else max(SHRINK_MAX, min(2.0, (base_s + target_s) / trip_s))
        if factor < 1 or self._was_limit:
            self.window = int(min(WINDOW_MAX_BYTES, max(WINDOW_MIN_BYTES, self.window * factor)))
        self._look_for_longer_path(trip_s)

    def _look_for_longer_path(self, trip_s: float) -> None:
        if self.window > WINDOW_MIN_BYTES:
            self._rounds_at_least = 0
            return
        self._rounds_at_least += 1
        if self._rounds_at_least >= ROUNDS_AT_LEAST:
            self.base_s, self._is_doubling, self._rounds_at_least = trip_s, True, 0
