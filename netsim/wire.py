"""How bytes get from one end to the other: cards that take turns, paths that delay and lose, acknowledgements, time-outs, resets.

Owns every event between two ends of a connection, all of them the world's own: a chunk leaves, arrives, is acknowledged, is
sent again. An idle card costs one event a chunk (its arrival), a contended one two, a receiver's bounded downlink one more.
Acknowledgements are no events: an arrival notes when its acknowledgement will be back, and a timer is set only where a flow waits
for one. Must not know addresses, listeners or dials (`netsim.fabric`), nor what the bytes mean. docs/netsim.md, section 3.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

from netsim import nat
from netsim.connection import DEAD, OPEN, ORPHANED, FabricConnection
from netsim.flow import (
    CHUNK_BYTES_MAX,
    FIN,
    NONE,
    RETRIES_MAX,
    RTO_MAX_S,
    SEGMENT_BYTES,
    TIMED_OUT,
    Card,
    Fin,
    Loss,
    Payload,
    first_lost,
    repeated_losses,
    segments_of,
)

if TYPE_CHECKING:
    from netsim.handshake import Dial, FabricListener
    from netsim.loop import VirtualLoop

CHUNK_S = 0.001
"""A contended card turns to the next connection after so much of its time."""

BARE_SEGMENT_BYTES = 40
"""What an end of bytes takes of a card."""

NAT_REFRESH_S = 30.0
"""How often a live connection is looked up in the boxes it goes through."""

_MASK = (1 << 64) - 1


class Trace(Protocol):
    """What the fabric needs of `netsim.trace.Trace`."""

    def add(self, kind: str, host: str, text: str) -> None: ...

    def data(self, host: str, source: str, count: int, checksum: int) -> None: ...


class Line:
    """A card's one direction, or a router: one thing at a time passes."""

    __slots__ = ("bytes_per_s", "chunk_bytes", "free_at", "is_armed", "queue_bytes", "ring")

    def __init__(self, bytes_per_s: float, queue_bytes: int = 0) -> None:
        self.bytes_per_s = bytes_per_s
        self.queue_bytes = queue_bytes
        whole = int(bytes_per_s * CHUNK_S) // SEGMENT_BYTES * SEGMENT_BYTES
        self.chunk_bytes = min(CHUNK_BYTES_MAX, max(SEGMENT_BYTES, whole))
        self.free_at = 0.0
        self.ring: deque[FabricConnection] = deque()
        self.is_armed = False


class Kernel:
    """What a machine has of the network beneath its process: a card, listeners, ends of connections."""

    def __init__(self, name: str, address: str, card: Card, boxes: Sequence[nat.NatBox]) -> None:
        self.name = name
        self.address = address
        self.card = card
        self.nat = tuple(boxes)
        self.uplink = Line(card.uplink_bytes_per_s) if card.uplink_bytes_per_s else None
        self.downlink = Line(card.downlink_bytes_per_s) if card.downlink_bytes_per_s else None
        self.is_on = self.is_reachable = True
        self.is_asleep = False
        self.incarnation = 0
        self.listeners: dict[int, FabricListener] = {}
        self.ends: dict[int, FabricConnection] = {}
        self.dials: dict[tuple[int, tuple[str, int]], Dial] = {}
        self.next_port = 49152
        self.opened = 0
        """Connections ever begun from here: what their draws of chance are keyed by."""

    def switch(self, *, is_on: bool | None = None, is_asleep: bool | None = None) -> None:
        """Power, and the lid."""
        self.is_on = self.is_on if is_on is None else is_on
        self.is_asleep = self.is_asleep if is_asleep is None else is_asleep
        self.is_reachable = self.is_on and not self.is_asleep


def uniform(key: int, number: int) -> float:
    """The ``number``-th draw in [0, 1) of a sequence (splitmix64): no state, so no draw moves another."""
    mixed = (key + number * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)


class Wire:
    """See the module."""

    def __init__(self, loop: VirtualLoop, trace: Trace) -> None:
        self.loop = loop
        self.trace = trace
        self.events = 0
        """Arrivals, turns of cards, time-outs and dials."""

    # --- leaving ---

    def send(self, end: FabricConnection) -> None:
        """Something waits in the end's flow, or may leave now."""
        if end.is_queued or end.socket is DEAD or not end.kernel.is_reachable:
            return
        line = end.kernel.uplink
        if line is None or end.other.kernel is end.kernel:
            now, flow = self.loop.now_s, end.flow
            while self._pull(end, CHUNK_BYTES_MAX, now, None) and (flow.unsent_bytes or flow.fin_wanted):
                pass
            return
        end.is_queued = True
        line.ring.append(end)
        if not line.is_armed:
            if line.free_at <= self.loop.now_s:
                self._turn(line)
            else:
                line.is_armed = True
                self.loop.post_at(line.free_at, self._turn_due, line)

    def _turn_due(self, line: Line) -> None:
        self.events += 1
        line.is_armed = False
        self._turn(line)

    def _turn(self, line: Line) -> None:
        """The card is free: the next connection that may send puts a chunk on it."""
        now, ring = self.loop.now_s, line.ring
        while ring:
            end = ring.popleft()
            end.is_queued = False
            if end.socket is DEAD or not end.kernel.is_reachable or not self._pull(end, line.chunk_bytes, now, line):
                continue
            if end.flow.unsent_bytes or end.flow.fin_wanted:
                end.is_queued = True
                ring.append(end)
            break
        if ring:
            line.is_armed = True
            self.loop.post_at(line.free_at, self._turn_due, line)

    def _pull(self, end: FabricConnection, most: int, now: float, line: Line | None) -> bool:
        """One chunk leaves, if the flow lets it."""
        flow, other = end.flow, end.other
        payload = flow.release(now, most, other.window_bytes - other.inbox_bytes)
        if payload is None:
            if flow.unsent_bytes or flow.fin_wanted:
                self._wait(end)
            return False
        end.is_waiting = False
        took = 0.0
        if line is not None:
            took = (len(payload) or BARE_SEGMENT_BYTES) / line.bytes_per_s
            line.free_at = now + took
        if end.is_plain:
            arrival = now + took + end.path.delay_s
            if arrival < flow.last_arrival:  # noqa: PLR1730 - max() takes three times as long, here of all places
                arrival = flow.last_arrival
            flow.last_arrival = arrival
            if other.kernel.downlink is None:
                self.loop.post_at(arrival, self._land, end, payload, now, 0.0, NONE)
            else:
                self.loop.post_at(arrival, self._arrive, end, payload, now, took, 0.0, NONE)
        else:
            self._depart(end, payload, now, took)
        if end.backlog is not None:
            end.wake_writer()
        return True

    def _wait(self, end: FabricConnection) -> None:
        """Until an acknowledgement, a window or a time-out: the first of them that is known."""
        end.is_waiting = True
        if end.flow.acks and not end.ack_armed:
            end.ack_armed = True
            self.loop.post_at(end.flow.acks[0][0], self._ack_due, end)
        elif not end.flow.in_flight and not end.probe_armed:
            end.probe_armed = True
            self.loop.post_at(self.loop.now_s + end.flow.rto_s, self._probe_window, end, 0, 1)

    def _probe_window(self, end: FabricConnection, silent: int, number: int) -> None:
        """The receiver's window is shut: ask whether it still is, less and less often; ``silent`` probes went unanswered."""
        self.events += 1
        other, flow = end.other, end.flow
        end.probe_armed = False
        if end.socket is DEAD or not end.is_waiting or flow.in_flight:
            return
        if end.is_cut or other.is_cut or not other.kernel.is_reachable:
            silent += 1
            if silent > RETRIES_MAX:
                self.broken(end, TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
                return
        elif other.socket is DEAD:
            self.send_reset(other)
            return
        elif other.inbox_bytes < other.window_bytes:
            self.send(end)
            return
        else:
            silent = 0
        end.probe_armed = True
        wait = min(RTO_MAX_S, flow.rto_s * 2.0**number)
        self.loop.post_at(self.loop.now_s + wait, self._probe_window, end, silent, number + 1)

    def _ack_due(self, end: FabricConnection) -> None:
        self.events += 1
        end.ack_armed = False
        if end.is_waiting:
            self.send(end)

    def _depart(self, end: FabricConnection, payload: Payload, now: float, took: float) -> None:
        """By a path with more to it than a delay."""
        path, flow = end.path, end.flow
        arrival = now + took + path.delay_s
        late = 0.0
        loss: Loss = NONE
        if end.router is not None:
            arrival, lost = self._through(end.router, payload, now + took)
            arrival += path.delay_s
            if lost is not None:
                late, loss = flow.recovery(segments_of(len(payload)), lost, 0, flow.rtt_s or 2 * path.delay_s)
        if path.jitter_s:
            arrival += path.jitter_s * self._draw(end)
        if path.loss and loss is NONE:
            segments = segments_of(len(payload))
            lost = first_lost(segments, path.loss, self._draw(end))
            if lost is not None:
                repeats = repeated_losses(path.loss, self._draw(end))
                late, loss = flow.recovery(segments, lost, repeats, flow.rtt_s or 2 * path.delay_s)
        if arrival < flow.last_arrival:  # noqa: PLR1730 - as above
            arrival = flow.last_arrival
        flow.last_arrival = arrival
        if end.kernel.nat or end.other.kernel.nat:
            self._refresh(end, now)
        if end.other.kernel.downlink is None:
            self.loop.post_at(arrival, self._land, end, payload, now, late, loss)
        else:
            self.loop.post_at(arrival, self._arrive, end, payload, now, took, late, loss)

    def _through(self, router: Line, payload: Payload, now: float) -> tuple[float, int | None]:
        """When a chunk is through a path's router, and which segment was the first that its queue had no room for."""
        count = len(payload) or BARE_SEGMENT_BYTES
        queued = max(0.0, router.free_at - now) * router.bytes_per_s
        over = int(queued + count - router.queue_bytes)
        lost = max(0, segments_of(count) - segments_of(over)) if over > 0 else None
        router.free_at = min(max(router.free_at, now) + count / router.bytes_per_s, now + self._full_s(router))
        return max(router.free_at, now), lost

    @staticmethod
    def _full_s(router: Line) -> float:
        return router.queue_bytes / router.bytes_per_s

    def _draw(self, end: FabricConnection) -> float:
        end.draws += 1
        return uniform(end.key, end.draws)

    # --- arriving ---

    def _arrive(
        self, end: FabricConnection, payload: Payload, sent_at: float, took: float, late: float, loss: Loss
    ) -> None:
        """At the receiver's access line, which it takes a while to come down; its first byte came ``took`` before."""
        line, now = end.other.kernel.downlink, self.loop.now_s
        if line is not None:
            down = (len(payload) or BARE_SEGMENT_BYTES) / line.bytes_per_s
            began = now - took
            free_at = (line.free_at if line.free_at > began else began) + down
            line.free_at = free_at = free_at if free_at > now else now
            if free_at > now:
                self.events += 1
                self.loop.post_at(free_at, self._land, end, payload, sent_at, late, loss)
                return
        self._land(end, payload, sent_at, late, loss)

    def _land(self, end: FabricConnection, payload: Payload, sent_at: float, late: float, loss: Loss) -> None:
        self.events += 1
        flow, other, count = end.flow, end.other, len(payload)
        here, there = end.kernel, other.kernel
        flow.on_wire_bytes -= count
        if end.is_cut or flow.lost or not there.is_reachable:
            if end.socket is not DEAD:
                flow.swallowed(payload, sent_at)
                self._arm(end, sent_at)
            return
        if other.accept is not None:
            other.accept()
        if other.socket is not OPEN:
            self._refused(end, other, payload)
            return
        segments = (count + SEGMENT_BYTES - 1) // SEGMENT_BYTES or 1
        if other.is_cut or not here.is_reachable:
            flow.unanswered(segments, sent_at)
            self._arm(end, sent_at)
        else:
            back = self.loop.now_s + other.path.delay_s
            if loss is TIMED_OUT:
                back += late
            acks = flow.acks
            if flow.unheard or (acks and back < acks[-1][0]):
                flow.acknowledge(back, segments, sent_at, loss)
            else:
                acks.append((back, segments, sent_at, loss))
            if end.is_waiting and not end.ack_armed:
                end.ack_armed = True
                self.loop.post_at(back, self._ack_due, end)
        if payload is FIN:
            self.trace.add("fin", there.name, here.name)
            self._over(end)
        elif end.cut_after is not None and other.arrived_bytes + count >= end.cut_after:
            self._cut_here(end, other, payload)  # type: ignore[arg-type]
            return
        else:
            other.arrived_bytes += count
            self.trace.data(there.name, here.name, count, crc32(payload))  # type: ignore[arg-type]
        other.receive(payload, late)

    def _cut_here(self, end: FabricConnection, other: FabricConnection, payload: bytes | memoryview) -> None:
        allowed = max(0, (end.cut_after or 0) - other.arrived_bytes)
        if allowed:
            other.arrived_bytes += allowed
            self.trace.data(other.kernel.name, end.kernel.name, allowed, crc32(payload[:allowed]))
            other.receive(payload[:allowed], 0.0)
        self.reset(end)

    @staticmethod
    def _over(end: FabricConnection) -> None:
        """Its end was heard: an end that nobody holds any more is done with."""
        if end.socket is ORPHANED:
            end.socket = DEAD
            end.kernel.ends.pop(end.serial, None)

    def _refused(self, end: FabricConnection, other: FabricConnection, payload: Payload) -> None:
        """Bytes came to an end that nobody reads: its kernel answers with a reset."""
        if isinstance(payload, Fin):
            self._over(end)
            return
        if other.socket is ORPHANED:
            other.broken(reset_error())
            other.kernel.ends.pop(other.serial, None)
        self.send_reset(other)

    # --- what doesn't arrive ---

    def _arm(self, end: FabricConnection, sent_at: float) -> None:
        if not end.rto_armed and end.socket is not DEAD:
            end.rto_armed = True
            self.loop.post_at(max(self.loop.now_s, sent_at + end.flow.rto_s), self._timed_out, end)

    def _timed_out(self, end: FabricConnection) -> None:
        """The retransmission timer."""
        self.events += 1
        end.rto_armed = False
        now, flow = self.loop.now_s, end.flow
        if end.socket is DEAD:
            return
        if end.kernel.is_asleep:
            self._arm(end, now)
            return
        flow.count_acks(now)
        if not flow.is_stuck:
            return
        if not flow.timed_out():
            self.broken(end, TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        elif flow.has_more:
            self.send(end)
        else:
            self.loop.post_at(now + end.path.delay_s, self._probe_lands, end, now)

    def _probe_lands(self, end: FabricConnection, sent_at: float) -> None:
        """A segment sent again that the receiver has already: all it does is ask for an acknowledgement."""
        self.events += 1
        other = end.other
        if end.socket is DEAD:
            return
        if end.is_cut or not other.kernel.is_reachable:
            self._arm(end, sent_at)
        elif other.socket is DEAD:
            self.send_reset(other)
        elif other.is_cut or not end.kernel.is_reachable:
            self._arm(end, sent_at)
        else:
            back = self.loop.now_s + other.path.delay_s
            end.flow.acknowledge(back, 0, sent_at)
            if end.is_waiting and not end.ack_armed:
                end.ack_armed = True
                self.loop.post_at(back, self._ack_due, end)

    def window_opened(self, end: FabricConnection) -> None:
        """The reader took bytes from a full buffer: its sender hears of it."""
        sender = end.other
        if not sender.is_waiting or sender.socket is DEAD:
            return
        if not end.is_cut and sender.kernel.is_reachable:  # otherwise its next probe finds out
            self.loop.post_at(self.loop.now_s + end.path.delay_s, self._window_seen, sender)

    def _window_seen(self, end: FabricConnection) -> None:
        self.events += 1
        if end.is_waiting:
            self.send(end)

    # --- ends ---

    def send_reset(self, end: FabricConnection) -> None:
        """This end's kernel tells the other one that there is nothing here (any more)."""
        other = end.other
        if end.is_cut or not end.kernel.is_reachable:
            return
        when = max(self.loop.now_s + end.path.delay_s, end.flow.last_arrival)
        self.loop.post_at(when, self._reset_lands, other)

    def _reset_lands(self, end: FabricConnection) -> None:
        self.events += 1
        if end.kernel.is_reachable:
            self.broken(end, reset_error())

    def reset(self, end: FabricConnection) -> None:
        """Both ends, now."""
        self.broken(end, reset_error())
        self.broken(end.other, reset_error())

    def broken(self, end: FabricConnection, error: OSError) -> None:
        """The kernel gives an end up."""
        if end.socket is DEAD:
            return
        if end.accept is not None:
            end.accept()
        end.kernel.ends.pop(end.serial, None)
        self.trace.add(
            "broken", end.kernel.name, f"{end.other.kernel.name} {errno.errorcode.get(error.errno or 0, '?')}"
        )
        end.broken(error)

    def closed_by_application(self, end: FabricConnection, error: BaseException | None) -> None:
        """The transport let go of its socket, or the process of it."""
        if end.socket is not OPEN:
            return
        now = self.loop.now_s
        self.trace.add("end", end.kernel.name, f"{end.other.kernel.name} {type(error).__name__ if error else 'closed'}")
        if end.orphan():
            self.send(end)
        else:
            end.broken(reset_error())
            end.kernel.ends.pop(end.serial, None)
            self.send_reset(end)
        if end.kernel.nat:
            nat.outbound(end.kernel.nat, end.local, end.remote, now, nat.Passage.ENDED)

    def _refresh(self, end: FabricConnection, now: float) -> None:
        """Boxes on the way forget connections that are silent for long, and then swallow what comes."""
        if now < end.nat_at:
            return
        end.nat_at = now + NAT_REFRESH_S
        passage = nat.Passage.ESTABLISHED
        if nat.outbound(end.kernel.nat, end.local, end.remote, now, passage) is None or (
            nat.inbound(end.other.kernel.nat, end.remote, end.other.remote, now, passage) is None
        ):
            end.is_forgotten = end.is_cut = True

    def run_in(self, end: FabricConnection, callback: Callable[[], None]) -> None:
        """Call an application from the kernel: in its host's context, when its process next runs."""
        if self.loop.is_frozen(end.kernel.name):
            self.loop.call_soon(callback, context=end.context)
        else:
            end.context.run(callback)


def reset_error() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
