"""The driver's machine: one session, its route, what is under way in the ring, and when a hop is lost.

Owns turns, epochs, credits and the driver's half of `docs/protocol.md` (sections 3 and 4.2). Must not know
streams, devices, sampling or how routes are planned: it is handed routes and windows, and says what to send and
what happened. No clock, no randomness, no I/O: `now` is a parameter (monotonic seconds).

The story of a session: `open(route)` → `RouteReady` → `submit` … `Output` … until `RouteLost` (plan again,
`open`, send every token again: the epoch rises, turns go on) or `close`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from blocks.protocol import limits
from blocks.protocol.cells import DRIVER_CELLS, DRIVER_PHASES, Age, DriverPhase, DriverRule
from blocks.protocol.commands import (
    CloseHops,
    DriverCommand,
    DriverEvent,
    Ended,
    Moving,
    OpenHop,
    Output,
    RouteLost,
    RouteReady,
    SendControl,
    SendData,
)
from blocks.protocol.decoding import decode
from blocks.protocol.liveness import HopWatch, progress_deadline_s, ring_deadline_s
from blocks.protocol.messages import (
    Cancel,
    Close,
    Envelope,
    Epoch,
    Gap,
    Heartbeat,
    Leaving,
    Open,
    Ready,
    Report,
    Result,
    SessionError,
    SessionMessage,
    Want,
    Window,
)
from blocks.protocol.ring import Ring, Turn
from blocks.protocol.session_errors import BadMessage, SessionFault
from overlay.errors import PeerdError
from overlay.rpc.types import DTYPE_BYTES, Message, Part
from routing.types import ComputeClass, Hop, ModelId, Route


@dataclass(frozen=True, slots=True)
class DriverSettings:
    """What stays the same for a session's life.

    ``session`` is 16 random bytes; ``incarnation`` was stored and synced before this process's first frame.
    A boundary is (tokens, ``width``) of ``dtype``; ``prompts``, (blocks of the routes, length, ``width``), goes along with each `open`,
    every hop getting its own blocks' rows.
    """

    session: bytes
    incarnation: int
    self_peer: bytes
    addresses: tuple[str, ...]
    model: ModelId
    compute_class: ComputeClass
    max_tokens: int
    width: int
    dtype: str
    adapter: str = ""
    heartbeat_s: float = 1.0
    lease_s: float = limits.LEASE_S_MAX
    prompts: Part | None = None

    @property
    def token_bytes(self) -> int:
        return self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class DriverStatistics:
    """A snapshot for people and metrics."""

    epoch: Epoch
    phase: str
    turns: int
    under_way: int
    queued: int
    refused: tuple[tuple[str, int], ...]


class Driver:
    """One session at the side that owns it. Remote input never raises; wrong use by its owner does (ValueError)."""

    def __init__(self, settings: DriverSettings) -> None:
        if len(settings.session) != limits.SESSION_ID_BYTES:
            raise ValueError("a session id is 16 bytes")
        self._settings = settings
        self._class_name = str(settings.compute_class)
        self._phase = DriverPhase.IDLE
        self._epoch = Epoch(settings.incarnation, 0)
        self._hops: tuple[Hop, ...] = ()
        self._watches: list[HopWatch] = []
        self._ring = Ring(settings.token_bytes)
        self._longest_s = 0.0
        self._gap: tuple[int, float] | None = None
        self._moved: list[int] = []
        self._tick_at: float | None = None
        self._beat_at = 0.0
        self._refused: Counter[str] = Counter()
        self._commands: list[DriverCommand] = []
        self._events: list[DriverEvent] = []

    # --- what the owner sees ---

    @property
    def epoch(self) -> Epoch:
        return self._epoch

    @property
    def phase(self) -> DriverPhase:
        return self._phase

    @property
    def position(self) -> int:
        """Where the next window may start at the latest: the end of what was submitted on this route."""
        return self._ring.position

    @property
    def room(self) -> int:
        """How many windows of the granted size could be sent at once, without waiting for a result."""
        return self._ring.room

    def statistics(self) -> DriverStatistics:
        return DriverStatistics(
            self._epoch,
            self._phase.name.lower(),
            self._ring.last_turn,
            len(self._ring.under_way),
            self._ring.queued,
            tuple(sorted(self._refused.items())),
        )

    # --- what the owner does ---

    def open(self, route: Route, now: float) -> Epoch:
        """Take ``route``, the first or the next: hops left behind are closed, every hop of it drops its KV.

        Windows of the former route are forgotten; turns go on; the next window starts at position 0.
        """
        if self._phase is DriverPhase.CLOSED:
            raise ValueError("a closed session opens no route")
        if len(route) > limits.ROUTE_HOPS_MAX:
            raise ValueError(f"a route has at most {limits.ROUTE_HOPS_MAX} hops")
        epoch = Epoch(self._settings.incarnation, self._epoch.counter + 1)
        self._leave_route(epoch, route.hops)
        self._epoch, self._hops = epoch, route.hops
        self._watches = [HopWatch(now + self._open_s(index)) for index in range(len(route))]
        self._forget_windows()
        self._moved.clear()
        self._enter(DriverPhase.OPENING)
        for index, hop in enumerate(route.hops):
            self._commands.append(OpenHop(epoch, index, hop))
            self._send(index, self._open_message(index))
        self._beat_at = now + self._settings.heartbeat_s
        self._tick_at = now + self._settings.heartbeat_s / 4
        return epoch

    def submit(self, hidden: Part, position: int, tokens: int, want: Want, now: float) -> int:
        """Send one window, at once or when credits allow; returns its turn.

        ``hidden`` has shape (tokens, width). On a lost route it goes nowhere, since all is to be sent again.

        Raises:
            ValueError: for a window that no route could carry (a gap, too long, the wrong shape).
        """
        self._check_window(hidden, position, tokens, want)
        if self._phase in (DriverPhase.LOST, DriverPhase.CLOSED):
            return self._ring.next_turn()
        turn = self._ring.add(hidden, position, tokens, want)
        if self._phase is DriverPhase.FLOWING:
            self._flow(now)
        return turn

    def cancel(self, now: float) -> None:
        """Start no window that was submitted so far; their credits come back with their (empty) results.

        The next window starts at or before where the first of them did.
        """
        if self._phase not in (DriverPhase.OPENING, DriverPhase.FLOWING):
            return
        self._ring.cancel()
        for index in range(len(self._hops)):
            self._send(index, Cancel(self._settings.session, self._epoch, index, self._ring.last_turn))

    def close(self, now: float) -> None:
        """End the session: every hop frees its KV. Harmless when it has ended."""
        if self._phase is DriverPhase.CLOSED:
            return
        self._leave_route(self._epoch, ())
        self._end()

    def hop_lost(self, epoch: Epoch, hop_index: int, error: PeerdError, now: float) -> None:
        """The shell saw a stream of ``epoch`` to this hop end unasked, or could not open it."""
        if epoch == self._epoch:
            self._lose(hop_index, None, error)

    def receive(self, message: Message, origin: bytes, now: float) -> None:
        """Take one message; ``origin`` is the authenticated peer of the connection that brought it."""
        try:
            decoded = decode(message)
        except BadMessage as error:
            self._blame_sender(origin, error)
            return
        cells = DRIVER_CELLS.get(message.kind)
        if cells is None or decoded.session != self._settings.session:
            self._blame_sender(origin, BadMessage(f"a driver takes no {message.kind!r} of this session"))
            return
        if decoded.epoch < self._epoch:
            return
        index = decoded.hop_index
        hops = self._hops
        if index >= len(hops) or hops[index].peer != origin or message.sender != origin:
            self._refused["not-authorised"] += 1
            return
        if self._phase not in (DriverPhase.OPENING, DriverPhase.FLOWING):
            return
        age = Age.EQUAL if decoded.epoch == self._epoch else Age.HIGHER
        self._apply(cells[age], decoded, now)

    # --- time ---

    def next_timeout(self) -> float | None:
        return self._tick_at

    def on_timeout(self, now: float) -> None:
        """Beat, and hold each deadline against ``now``. Early calls are harmless."""
        if self._tick_at is None or now < self._tick_at:
            return
        late_s = now - self._tick_at
        if late_s > self._settings.heartbeat_s:
            self._forgive(late_s)
        self._tick_at = now + self._settings.heartbeat_s / 4
        if now >= self._beat_at:
            self._beat_at = now + self._settings.heartbeat_s
            for index in range(len(self._hops)):
                self._send(index, Heartbeat(self._settings.session, self._epoch, index))
        self._check_deadlines(now)

    def poll_commands(self) -> list[DriverCommand]:
        commands, self._commands = self._commands, []
        return commands

    def poll_events(self) -> list[DriverEvent]:
        events, self._events = self._events, []
        return events

    # --- the cells of section 4.2 ---

    def _apply(self, rule: DriverRule, message: SessionMessage, now: float) -> None:
        watch = self._watches[message.hop_index]
        if rule is DriverRule.RESULT and isinstance(message, Result):
            self._on_result(message, watch, now)
        elif rule is DriverRule.BEAT and isinstance(message, Heartbeat):
            self._on_beat(message, watch, now)
        elif rule is DriverRule.READY and isinstance(message, Ready):
            self._on_ready(message, watch, now)
        elif rule is DriverRule.GAP and isinstance(message, Gap):
            self._on_gap(message, now)
        elif rule is DriverRule.REPORT and isinstance(message, Report):
            self._on_report(message)
        elif rule is DriverRule.LEAVING and isinstance(message, Leaving):
            self._on_leaving(message)
        elif rule is DriverRule.ERROR and isinstance(message, SessionError):
            self._on_error(message)
        elif rule is DriverRule.VIOLATION:
            self._violation(message.hop_index, f"a {message.KIND} of an epoch that was never opened")

    def _on_ready(self, ready: Ready, watch: HopWatch, now: float) -> None:
        if watch.ready is not None:
            if watch.rebooted(ready.boot_id):
                self._lose(ready.hop_index, None, SessionFault("rebooted", "the hop restarted"))
            return
        watch.took_place(ready, now)
        grants = [other.ready for other in self._watches if other.ready is not None]
        if len(grants) < len(self._hops):
            return
        ring = self._ring
        ring.take_grants(grants)
        if ring.window_tokens < 1:
            self._lose(ready.hop_index, None, SessionFault("limit", "a hop takes less than one token's bytes"))
            return
        self._enter(DriverPhase.FLOWING)
        self._events.append(
            RouteReady(self._epoch, ring.credits.windows_granted, ring.window_tokens, ring.rollback_tokens)
        )
        self._flow(now)

    def _on_result(self, result: Result, watch: HopWatch, now: float) -> None:
        if result.hop_index != len(self._hops) - 1:
            self._violation(result.hop_index, "a result from a hop that isn't the last")
            return
        turn = self._ring.under_way.get(result.turn)
        if turn is None:
            if not self._ring.was_sent(result.turn):
                self._violation(result.hop_index, "a result for a turn that was never sent")
            return
        if not self._answers(result, turn):
            self._violation(result.hop_index, "a result that doesn't answer its turn")
            return
        self._ring.answer(result.turn)
        watch.heard_at = now
        self._longest_s = max(self._longest_s, (now - turn.sent_at) / turn.tokens)
        if self._gap is not None and self._gap[0] <= result.turn:
            self._gap = None
        if not turn.cancelled:
            self._events.append(Output(turn.turn, turn.position, turn.tokens, result.hidden))
        if self._ring.queued:
            self._flow(now)

    def _answers(self, result: Result, turn: Turn) -> bool:
        settings = self._settings
        same = (
            result.position == turn.position
            and result.tokens == turn.tokens
            and result.want == turn.want
            and result.branch == 0
            and result.model == settings.model
            and result.compute_class == self._class_name
            and (not result.cancelled or turn.cancelled)
        )
        hidden = result.hidden
        return same and (hidden is None or (hidden.dtype == settings.dtype and hidden.shape[1] == settings.width))

    def _on_beat(self, heartbeat: Heartbeat, watch: HopWatch, now: float) -> None:
        if watch.ready is None:
            return
        if watch.rebooted(heartbeat.boot_id):
            self._lose(heartbeat.hop_index, None, SessionFault("rebooted", "the hop restarted"))
            return
        watch.beat(heartbeat, now)

    def _on_gap(self, gap: Gap, now: float) -> None:
        if gap.turn not in self._ring.under_way:
            if not self._ring.was_sent(gap.turn):
                self._violation(gap.hop_index, "a gap for a turn that was never sent")
            return
        if self._gap is not None:
            return
        if gap.hop_index == 0:  # its predecessor is the driver, which keeps no outputs: token ids are its journal
            self._lose(None, None, SessionFault("gap", f"hop 0 holds only {gap.have} tokens"))
            return
        self._gap = (gap.turn, now + limits.GAP_REPAIR_S)

    def _on_report(self, report: Report) -> None:
        edge = report.edge if report.edge != report.hop_index else None
        if edge is None or abs(edge - report.hop_index) > 1 or edge > len(self._hops):
            self._violation(report.hop_index, "a report of an edge that the hop doesn't have")
            return
        # What one hop says of its neighbour is its word alone: the edge is blamed, whatever the code.
        fault = SessionFault("edge-lost", f"hop {report.hop_index} reports {report.code} towards hop {edge}")
        self._lose(report.hop_index, edge, fault)

    def _on_leaving(self, leaving: Leaving) -> None:
        if leaving.hop_index not in self._moved:
            self._moved.append(leaving.hop_index)
            self._events.append(Moving(self._epoch, leaving.hop_index, leaving.deadline_s))

    def _on_error(self, error: SessionError) -> None:
        if error.code == "unsupported":
            self._refused["unsupported"] += 1
            return
        fault = SessionFault(error.code, error.message or error.code, error.retry_after_s)
        if error.code == "fenced":
            self._leave_route(self._epoch, ())
            self._end()
            self._events.append(Ended(fault))
            return
        self._lose(error.hop_index, None, fault)

    # --- the ring ---

    def _flow(self, now: float) -> None:
        """Send what is queued while credits last."""
        settings = self._settings
        while (sent := self._ring.send_next(now)) is not None:
            turn, hidden = sent
            window = Window(
                settings.session, self._epoch, 0, 0, turn.turn, turn.position, turn.tokens, turn.want,
                settings.model, self._class_name, settings.adapter, None, hidden,
            )  # fmt: skip
            message = window.to_message(settings.self_peer, self._hops[0].peer)
            self._commands.append(SendData(self._epoch, message))
        if self._ring.is_stuck:
            self._lose(None, None, SessionFault("window-too-large", "a window is larger than its route takes"))

    def _check_window(self, hidden: Part, position: int, tokens: int, want: Want) -> None:
        settings = self._settings
        if self._phase is DriverPhase.IDLE:
            raise ValueError("open a route first")
        if tokens < 1 or hidden.shape != (tokens, settings.width) or hidden.dtype != settings.dtype:
            raise ValueError(f"a window of {tokens} tokens is ({tokens}, {settings.width}) of {settings.dtype}")
        if not isinstance(want, str) and not position <= want[0] < want[1] <= position + tokens:
            raise ValueError("the rows wanted lie outside the window")
        if position < 0 or position + tokens > settings.max_tokens:
            raise ValueError(f"the session was opened for {settings.max_tokens} tokens")
        if self._phase is not DriverPhase.FLOWING:
            return  # the route that this window was made for may be gone: nothing below is known
        fault = self._ring.fault(position, tokens)
        if fault is not None:
            raise ValueError(fault)

    def _forget_windows(self) -> None:
        self._ring.clear()
        self._gap = None

    # --- routes come and go ---

    def _enter(self, phase: DriverPhase) -> None:
        """The one place where the phase changes."""
        if phase not in DRIVER_PHASES[self._phase]:
            raise ValueError(f"a session can't go from {self._phase.name} to {phase.name}")
        self._phase = phase

    def _lose(self, hop_index: int | None, edge: int | None, error: PeerdError) -> None:
        if self._phase not in (DriverPhase.OPENING, DriverPhase.FLOWING):
            return
        self._enter(DriverPhase.LOST)
        self._tick_at = None
        self._forget_windows()
        self._events.append(RouteLost(self._epoch, hop_index, edge, error))

    def _leave_route(self, epoch: Epoch, kept: tuple[Hop, ...]) -> None:
        """Close every hop that isn't at the same place of ``kept``, and all streams of the current epoch."""
        if not self._hops:
            return
        for index, hop in enumerate(self._hops):
            if index >= len(kept) or kept[index].peer != hop.peer:
                self._send(index, Close(self._settings.session, epoch, index))
        self._commands.append(CloseHops(self._epoch))
        self._hops = ()

    def _end(self) -> None:
        self._enter(DriverPhase.CLOSED)
        self._tick_at = None
        self._forget_windows()

    def _open_message(self, index: int) -> Open:
        settings = self._settings
        return Open(
            settings.session,
            self._epoch,
            index,
            settings.model,
            self._class_name,
            settings.adapter,
            self._hops,
            settings.addresses[: limits.HOP_ADDRESSES_MAX],
            settings.max_tokens,
            settings.heartbeat_s,
            settings.lease_s,
            self._prompts_of(index),
        )

    def _open_s(self, index: int) -> float:
        prompts = self._prompts_of(index)
        return 0.0 if prompts is None else prompts.size_bytes / limits.OPEN_BYTES_PER_S_MIN

    def _prompts_of(self, index: int) -> Part | None:
        prompts = self._settings.prompts
        if prompts is None:
            return None
        span, first = self._hops[index].span, self._hops[0].span.start
        block_bytes = len(prompts.data) // prompts.shape[0]
        start, end = ((block - first) * block_bytes for block in (span.start, span.end))
        data = memoryview(prompts.data).cast("B")[start:end]
        return Part("prompts", prompts.dtype, (len(span), *prompts.shape[1:]), data)

    def _send(self, index: int, message: Envelope) -> None:
        wire = message.to_message(self._settings.self_peer, self._hops[index].peer)
        self._commands.append(SendControl(self._epoch, index, wire))

    # --- faults ---

    def _violation(self, hop_index: int, text: str) -> None:
        self._refused["protocol-violation"] += 1
        self._lose(hop_index, None, SessionFault("protocol-violation", text))

    def _blame_sender(self, origin: bytes, error: BadMessage) -> None:
        """A message that can't be read names no hop: the first one of that peer answers for it."""
        self._refused[error.code] += 1
        for index, hop in enumerate(self._hops):
            if hop.peer == origin:
                self._lose(index, None, error)
                return

    def _forgive(self, late_s: float) -> None:
        for watch in self._watches:
            watch.forgive(late_s)
        self._ring.forgive(late_s)

    def _check_deadlines(self, now: float) -> None:
        if self._gap is not None and now >= self._gap[1]:
            self._lose(None, None, SessionFault("gap", "a hop lacks tokens that its predecessor no longer has"))
            return
        tokens = max((turn.tokens for turn in self._ring.under_way.values()), default=1)
        progress_s = progress_deadline_s(tokens, self._longest_s)
        for index, watch in enumerate(self._watches):
            fault = watch.fault(now, self._settings.heartbeat_s, progress_s)
            if fault is not None:
                self._lose(index, None, fault)
                return
        self._check_ring(now, progress_s)

    def _check_ring(self, now: float, progress_s: float) -> None:
        """A turn that no hop owns to, or that takes far too long, is lost: nobody beats for it."""
        oldest = self._ring.oldest
        if oldest is None:
            return
        size_bytes = self._ring.bytes_under_way
        age_s = now - oldest.sent_at
        link_s = len(self._hops) * size_bytes / limits.LINK_BYTES_PER_S_MIN
        owned = [index for index, watch in enumerate(self._watches) if watch.oldest_s is not None]
        if not owned and age_s > limits.WINDOW_LOST_S + link_s:
            self._lose(None, None, SessionFault("window-lost", f"turn {oldest.turn} fell between two hops"))
        elif age_s > ring_deadline_s(len(self._hops), size_bytes, progress_s):
            slowest = max(owned, key=lambda index: self._watches[index].oldest_s or 0.0, default=None)
            self._lose(slowest, None, SessionFault("stalled", f"turn {oldest.turn} took {age_s:.0f} s"))
