"""One direction of a TCP connection: what waits to be sent, and how much of it may leave now. Pure.

Owns the congestion window (slow start, one segment a round trip after it, halving, collapse, idle restart), the estimate of the
round trip, retransmission time-outs and what a black hole swallowed. Windows are counted in segments, as Linux does: a small
write costs a whole one. Knows nothing of who carries the bytes: `netsim.wire` releases chunks, says when their
acknowledgements will be back, and hands back what didn't arrive. RFC 5681, 6298, 2861; docs/netsim.md, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

SEGMENT_BYTES = 1460
CHUNK_BYTES_MAX = 64 << 10
"""What leaves in one go, and what a reader gets at most at once."""

RTO_MIN_S = 0.2
RTO_FIRST_S = 1.0
RTO_MAX_S = 120.0
RETRIES_MAX = 15
"""Doublings before the connection is given up: Linux's tcp_retries2."""

DUPLICATES = 3
"""So many segments behind a lost one tell of the loss; with fewer it takes a time-out."""

COLLAPSED_SEGMENTS = 1
WINDOW_SEGMENTS_MIN = 2
UNLIMITED_SEGMENTS = 1 << 30


@dataclass(frozen=True, slots=True)
class Path:
    """One direction between two hosts. ``loss`` is of a segment, ``jitter_s`` uniform on top of the delay.

    ``bytes_per_s`` is of this path alone, besides the hosts' cards: a router with a queue of ``queue_bytes`` that drops its tail.
    """

    delay_s: float = 0.005
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float | None = None
    queue_bytes: int = 256 << 10
    is_black_hole: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """A host's access line, shared by all its connections, and what its kernel gives each of them.

    ``notsent_lowat_bytes`` is what the kernel takes beyond what is in flight: production sets TCP_NOTSENT_LOWAT to it. The two
    buffers bound what is in flight, as Linux's largest ones do; they fill 1 Gbit/s only up to a round trip of 34 ms.
    """

    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None
    notsent_lowat_bytes: int = 128 << 10
    send_buffer_bytes: int = 4 << 20
    receive_window_bytes: int = 6 << 20
    initial_window_segments: int = 10


class Fin:
    """Stands in a flow for the end of its bytes."""

    def __len__(self) -> int:
        return 0


FIN = Fin()
Payload = bytes | memoryview | Fin


class Loss(IntEnum):
    """What a released chunk met, as its sender will learn."""

    NONE = 0
    NOTICED = 1
    """Segments behind it told: retransmitted after a round trip, the window halves."""
    TIMED_OUT = 2
    """Nothing told: retransmitted after a time-out, the window collapses."""


NONE, NOTICED, TIMED_OUT = Loss
"""By name: members of an enumeration are slow to look up."""


def segments_of(count: int) -> int:
    """The segments that ``count`` bytes take; an end without bytes takes one."""
    return (count + SEGMENT_BYTES - 1) // SEGMENT_BYTES or 1


def first_lost(segments: int, loss: float, draw: float) -> int | None:
    """The index of the first segment lost of ``segments``, by one uniform draw in [0, 1); None if all arrive."""
    if loss >= 1.0:
        return 0
    if draw >= 1.0 - (1.0 - loss) ** segments:
        return None
    return min(segments - 1, int(math.log1p(-draw) / math.log1p(-loss)))


def repeated_losses(loss: float, draw: float) -> int:
    """How often the retransmission is lost too, by one uniform draw in [0, 1)."""
    if loss >= 1.0:
        return RETRIES_MAX
    return min(RETRIES_MAX, int(math.log(max(draw, 1e-300)) / math.log(loss)))


class Flow:
    """See the module. Times are the caller's, in seconds, and never go back."""

    __slots__ = (
        "_credit",
        "acks",
        "backoffs",
        "card",
        "fin_wanted",
        "in_flight",
        "is_limited",
        "last_arrival",
        "last_sent",
        "lost",
        "most_segments",
        "most_unsent",
        "on_wire_bytes",
        "peak",
        "peak_at",
        "recover_until",
        "rtt_s",
        "rttvar_s",
        "ssthresh",
        "stuck_since",
        "unheard",
        "unsent",
        "unsent_bytes",
        "window",
    )

    def __init__(self, card: Card) -> None:
        self.card = card
        self.unsent: list[bytes | memoryview] = []
        self.unsent_bytes = 0
        self.fin_wanted = False
        self.window = card.initial_window_segments
        self.most_unsent = card.notsent_lowat_bytes
        self.most_segments = card.send_buffer_bytes // SEGMENT_BYTES
        self.ssthresh = UNLIMITED_SEGMENTS
        self.in_flight = 0
        self.on_wire_bytes = 0
        self.acks: list[tuple[float, int, float, Loss]] = []
        self.rtt_s = 0.0
        self.rttvar_s = 0.0
        self.last_sent = 0.0
        self.last_arrival = 0.0
        self.peak = 0
        self.peak_at = 0.0
        self.is_limited = False
        self.recover_until = 0.0
        self.lost: list[Payload] = []
        self.unheard = 0
        self.backoffs = 0
        self.stuck_since: float | None = None
        self._credit = 0

    # --- the send buffer ---

    @property
    def room(self) -> int:
        """Bytes that the kernel still takes."""
        return max(0, self.most_unsent - self.unsent_bytes)

    @property
    def is_writable(self) -> bool:
        """Whether a writer that waits is woken: half of the buffer is free."""
        return self.unsent_bytes * 2 < self.most_unsent

    @property
    def has_more(self) -> bool:
        return self.unsent_bytes > 0 or self.fin_wanted

    def queue(self, data: bytes | memoryview) -> None:
        """Take bytes to send; the caller keeps to `room`."""
        self.unsent.append(data)
        self.unsent_bytes += len(data)

    def clear(self) -> None:
        """The connection is over: nothing will be sent."""
        self.unsent.clear()
        self.lost.clear()
        self.unsent_bytes = 0
        self.fin_wanted = False

    # --- sending ---

    @property
    def rto_s(self) -> float:
        """The retransmission time-out, with the doublings so far."""
        first = self.rtt_s + max(RTO_MIN_S, 4 * self.rttvar_s) if self.rtt_s else RTO_FIRST_S
        return min(RTO_MAX_S, first * (1 << self.backoffs))

    def release(self, now: float, most: int, window_bytes: int) -> Payload | None:
        """Let at most ``most`` bytes leave, no more than the receiver's window has room for; None: nothing may leave now."""
        if self.acks and self.acks[0][0] <= now:
            self.count_acks(now)
        in_flight, window = self.in_flight, self.window
        if not in_flight and self.last_sent and now - self.last_sent > RTO_MIN_S and now - self.last_sent > self.rto_s:
            self._restart(now)
            window = self.window
        free = (window if window < self.most_segments else self.most_segments) - in_flight
        if free <= 0:
            self.is_limited = window <= in_flight
            return None
        count = self.unsent_bytes
        payload: Payload
        if count:
            room = window_bytes - self.on_wire_bytes
            if count > most or count > room or count > free * SEGMENT_BYTES:
                count = min(most, room, free * SEGMENT_BYTES)
                if count <= 0:
                    return None
            unsent = self.unsent
            if len(unsent[0]) == count:
                payload = unsent.pop(0)
                self.unsent_bytes -= count
            else:
                payload = self._take(count)
            segments = (count + SEGMENT_BYTES - 1) // SEGMENT_BYTES
            self.on_wire_bytes += count
        elif self.fin_wanted:
            self.fin_wanted = False
            payload, segments = FIN, 1
        else:
            return None
        self.in_flight = in_flight = in_flight + segments
        self.last_sent = now
        if in_flight > self.peak or now - self.peak_at > self.rtt_s:
            self.peak, self.peak_at = in_flight, now
        self.is_limited = in_flight >= window
        return payload

    def _take(self, count: int) -> bytes | memoryview:
        self.unsent_bytes -= count
        unsent = self.unsent
        first = unsent[0]
        if len(first) > count:
            view = memoryview(first)
            unsent[0] = view[count:]
            return view[:count]
        pieces: list[bytes | memoryview] = []
        used = 0
        while count:
            piece = unsent[used]
            if len(piece) > count:
                view = memoryview(piece)
                pieces.append(view[:count])
                unsent[used] = view[count:]
                break
            pieces.append(piece)
            count -= len(piece)
            used += 1
        del unsent[:used]
        return b"".join(pieces)

    def recovery(self, segments: int, lost_index: int, repeats: int, rtt_s: float) -> tuple[float, Loss]:
        """How much later a chunk is whole at the receiver when segment ``lost_index`` of it was lost, and what the sender learns."""
        behind = segments - 1 - lost_index + (DUPLICATES if self.unsent_bytes else 0)
        if behind >= DUPLICATES and not repeats:
            return rtt_s, NOTICED
        late, timeouts = (rtt_s, repeats) if behind >= DUPLICATES else (0.0, repeats + 1)
        rto = self.rto_s
        for _ in range(timeouts):
            late += rto
            rto = min(RTO_MAX_S, rto * 2)
        return late, TIMED_OUT

    # --- acknowledgements ---

    def acknowledge(self, when: float, segments: int, sent_at: float, loss: Loss = NONE) -> None:
        """The acknowledgement of segments sent at ``sent_at`` will be back at ``when``; it is counted when the flow is asked."""
        if self.acks and when < self.acks[-1][0]:
            when = self.acks[-1][0]
        self.acks.append((when, segments + self.unheard, sent_at, loss))
        self.unheard = 0

    def count_acks(self, now: float) -> None:
        """Count the acknowledgements whose time has come; those between two losses as one."""
        acks = self.acks
        counted = total = 0
        for when, segments, _, loss in acks:
            if when > now:
                break
            counted += 1
            if loss is NONE:
                total += segments
                continue
            self._acknowledged(total)
            total = 0
            self.in_flight = max(0, self.in_flight - segments)
            if loss is NOTICED and not self.backoffs:
                self.measured(when - acks[counted - 1][2])
            self._lost_some(when, loss)
        if counted:
            when, _, sent_at, loss = acks[counted - 1]
            if loss is NONE and not self.backoffs:
                self.measured(when - sent_at)
            self._acknowledged(total)
            self.backoffs = 0
            self.stuck_since = None
            if counted == len(acks):
                acks.clear()
            else:
                del acks[:counted]

    def _acknowledged(self, segments: int) -> None:
        """Segments arrived, none of them lost: the window grows while it is the limit."""
        self.in_flight = self.in_flight - segments if self.in_flight > segments else 0
        window = self.window
        if window < self.ssthresh:
            if window < 2 * self.peak:
                self.window = min(window + segments, self.ssthresh, 2 * self.peak)
        elif self.is_limited:
            self._credit += segments
            while self._credit >= self.window:
                self._credit -= self.window
                self.window += 1

    def measured(self, rtt_s: float) -> None:
        """A round trip, the handshake's or an acknowledgement's (RFC 6298)."""
        if not self.rtt_s:
            self.rtt_s, self.rttvar_s = rtt_s, rtt_s / 2
            return
        off = rtt_s - self.rtt_s
        self.rttvar_s += ((off if off > 0 else -off) - self.rttvar_s) / 4
        self.rtt_s += off / 8

    def _lost_some(self, when: float, loss: Loss) -> None:
        """Losses of one window count once."""
        if when < self.recover_until and loss is not TIMED_OUT:
            return
        self.ssthresh = max(self.window // 2, WINDOW_SEGMENTS_MIN)
        self.window = self.ssthresh if loss is NOTICED else COLLAPSED_SEGMENTS
        self.recover_until = when + self.rtt_s
        self._credit = 0

    def _restart(self, now: float) -> None:
        """After an idle time-out the window halves for each one that passed, down to the initial one (RFC 2861, as Linux does it)."""
        self.ssthresh = (
            max(self.ssthresh, self.window * 3 // 4) if self.ssthresh < UNLIMITED_SEGMENTS else self.ssthresh
        )
        lowest = min(self.card.initial_window_segments, self.window)
        idle = now - self.last_sent - self.rto_s
        while idle > 0 and self.window > lowest:
            self.window //= 2
            idle -= self.rto_s
        self.window = max(self.window, lowest)
        self.peak = 0
        self._credit = 0

    # --- black holes ---

    @property
    def is_stuck(self) -> bool:
        """Whether something was sent of which nothing will be heard before it is sent again."""
        return bool(self.lost) or self.unheard > 0

    def arrived(self, count: int) -> None:
        """Bytes are off the wire, taken or not."""
        self.on_wire_bytes -= count

    def swallowed(self, payload: Payload, sent_at: float) -> None:
        """A chunk didn't arrive, or arrived behind a hole."""
        self.lost.append(payload)
        if self.stuck_since is None:
            self.stuck_since = sent_at

    def unanswered(self, segments: int, sent_at: float) -> None:
        """A chunk arrived, but its acknowledgement won't."""
        self.unheard += segments
        if self.stuck_since is None:
            self.stuck_since = sent_at

    def timed_out(self) -> bool:
        """The retransmission time-out passed: what was lost is to be sent again, a segment at first. False: give the connection up."""
        if self.backoffs >= RETRIES_MAX:
            return False
        if not self.backoffs:
            self.ssthresh = max(min(self.in_flight, self.window) // 2, WINDOW_SEGMENTS_MIN)
        self.backoffs += 1
        self.window = COLLAPSED_SEGMENTS
        self._credit = 0
        self.in_flight = 0
        self.fin_wanted = self.fin_wanted or any(isinstance(payload, Fin) for payload in self.lost)
        again = [payload for payload in self.lost if not isinstance(payload, Fin)]
        self.unsent[:0] = again
        self.unsent_bytes += sum(map(len, again))
        self.lost.clear()
        return True
