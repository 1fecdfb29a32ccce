"""One hop of one session: its KV's story, its windows in order, its journal, what it says and when.

Owns the effects of `docs/protocol.md` section 4.1 on one session; `hops` decides which message reaches which
session, and with what authority. Must not know streams or the device: it appends commands and is told results.

Windows are accepted in turn order, computed in that order (the device keeps the order of one lease) and passed on
in that order, cancelled ones too: without rows, so that every turn that entered the ring leaves it as a result.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from hashlib import sha256

from blocks.protocol import limits
from blocks.protocol.admission import Grant
from blocks.protocol.cells import HOP_PHASES, HopPhase
from blocks.protocol.coded_faults import UNKNOWN
from blocks.protocol.commands import CloseNext, EdgeKey, HopCommand, OpenNext, Reply, SendNext, Submit
from blocks.protocol.device import JobPriority, JobResult, LeaseKey, ReleaseJob, SpanJob
from blocks.protocol.journal import Entry, Journal, JournalRoom
from blocks.protocol.messages import (
    Envelope,
    Gap,
    Heartbeat,
    Leaving,
    Open,
    Ready,
    Report,
    Result,
    SessionError,
    Want,
    Window,
)
from blocks.protocol.session_errors import CODES, SessionFault
from overlay.errors import PeerdError
from overlay.rpc.types import DTYPE_BYTES, Message, Part
from routing.types import Hop


@dataclass(slots=True)
class _Item:
    """One accepted window, until it was passed on. ``stale`` ones belong to a state that is gone."""

    turn: int
    position: int
    tokens: int
    want: Want
    input_digest: bytes | None
    hidden: Part | None
    came_at: float
    cancelled: bool
    size_bytes: int = 0
    job: SpanJob | None = None
    stale: bool = False


class HopSession:
    """The state of (session, hop index) at this node."""

    _turn: int
    """The last turn accepted."""
    _emptied: int
    """The last turn that was passed on without rows."""
    _end: int
    """Where the next window may start at the latest, once all that is accepted is computed."""
    _applied_end: int
    """The tokens that the device holds once it has done what it was given."""
    _gapped: bool

    def __init__(
        self,
        self_peer: bytes,
        boot_id: bytes,
        driver: bytes,
        lease: LeaseKey,
        commands: list[HopCommand],
        room: JournalRoom,
    ) -> None:
        """Take no place yet: `open` follows at once."""
        self._self_peer = self_peer
        self._boot_id = boot_id
        self._commands = commands
        self.lease = lease
        self.driver = driver
        self.phase = HopPhase.OPEN
        self.heard_at = 0.0
        self.beat_at = 0.0
        self.edge: EdgeKey | None = None
        self.windows_done = 0
        self.journal = Journal(limits.JOURNAL_BYTES_MAX, limits.JOURNAL_ENTRIES_MAX, room)
        self._waiting: deque[_Item] = deque()
        self._running: deque[_Item] = deque()

    # --- opening ---

    def open(self, order: Open, grant: Grant, control: object, now: float) -> None:
        """Take a place in a new route: KV and journal are dropped, the edge onwards is opened, `ready` said."""
        self._let_go()
        index, route = order.hop_index, order.route
        self.order, self.grant, self.control = order, grant, control
        self.epoch = order.epoch
        self.span = route[index].span
        self.predecessor = self.driver if index == 0 else route[index - 1].peer
        self.is_last = index == len(route) - 1
        onwards = Hop(self.driver, order.driver_addresses, self.span) if self.is_last else route[index + 1]
        self.successor = onwards.peer
        self.edge = EdgeKey(order.session, index, order.epoch)
        self.data: object | None = None
        self.lease_s = min(order.lease_s, limits.LEASE_S_MAX)
        self._token_bytes = grant.width * DTYPE_BYTES[grant.dtype]
        self._reported: list[int] = []
        self._watermark = 0
        self._forget_kv()
        self._commands.append(OpenNext(self.edge, onwards.peer, onwards.addresses, self.is_last))
        self.resume(control, now)

    def resume(self, control: object, now: float) -> None:
        """Say `ready` with what is really held, on ``control``, which is the session's channel from now on."""
        self.enter(HopPhase.OPEN)
        self.control = control
        self.heard_at = now
        self.beat_at = now + self.order.heartbeat_s
        have = self._applied_end
        self.tell(
            Ready(
                self.order.session,
                self.epoch,
                self.order.hop_index,
                self._boot_id,
                ((0, have),) if have else (),
                self.journal.first_position,
                self.grant.windows,
                self.grant.window_bytes,
                self.grant.rollback_tokens,
            )
        )

    def enter(self, phase: HopPhase) -> None:
        """The one place where the phase changes."""
        if phase not in HOP_PHASES[self.phase]:
            raise ValueError(f"a hop can't go from {self.phase.name} to {phase.name}")
        self.phase = phase

    def close(self) -> None:
        """Free everything. The object is not to be used again."""
        self.enter(HopPhase.CLOSED)
        self._let_go()
        self.journal.clear()

    def _let_go(self) -> None:
        """Leave the place in the former route, if there was one: its edge, its KV, its windows."""
        if self.edge is not None:
            self._drop_windows()
            self._commands += (CloseNext(self.edge), Submit(ReleaseJob(self.lease)))
            self.edge = None

    # --- windows ---

    def take_window(self, window: Window, channel: object, left_process: bool, now: float) -> None:
        """Apply the turn rule to a window of the present epoch that came from the predecessor."""
        self.data = channel
        turn = window.turn
        if turn < self._turn:
            return
        hidden = window.hidden
        digest = None
        if hidden is not None and (left_process or self.successor != self._self_peer):
            digest = hidden.digest or sha256(hidden.data).digest()
        if turn == self._turn:
            self._take_again(window, digest)
            return
        fault = self._fault_of(window)
        if fault is not None:
            self.refuse_input(window, fault)
            return
        cancelled = hidden is None or turn <= self._watermark
        if not cancelled and window.position > self._end:
            self._say_gap(window)
            return
        item = _Item(
            turn, window.position, window.tokens, window.want, digest, hidden, now, cancelled,
            0 if hidden is None else len(hidden.data),
        )  # fmt: skip
        if not self._admits(item):
            raise SessionFault("overrun", "more is under way than this hop granted")
        self._turn = turn
        self._gapped = False
        if not cancelled:
            self._end = window.position + window.tokens
        self._waiting.append(item)
        self._pump()

    def _fault_of(self, window: Window) -> SessionFault | None:
        order, hidden = self.order, window.hidden
        if (
            window.model != order.model
            or window.compute_class != order.compute_class
            or window.adapter != order.adapter
        ):
            return SessionFault("conflict", "a window of another model, compute class or adapter")
        if window.branch != 0:
            return SessionFault("unsupported", "this version serves branch 0 only")
        if window.position + window.tokens > order.max_tokens:
            return SessionFault("limit", f"the session was opened for {order.max_tokens} tokens")
        if hidden is not None and (hidden.shape[1] != self.grant.width or hidden.dtype != self.grant.dtype):
            return SessionFault("bad-window", f"a boundary here is {self.grant.width} of {self.grant.dtype}")
        if self._end - window.position > self.grant.rollback_tokens:
            return SessionFault("limit", f"this hop rolls back {self.grant.rollback_tokens} tokens at most")
        return None

    def _admits(self, item: _Item) -> bool:
        count, size_bytes = 1, item.size_bytes
        for held in (*self._running, *self._waiting):
            if not held.stale:
                count += 1
                size_bytes += held.size_bytes
        return count <= self.grant.windows and size_bytes <= self.grant.window_bytes

    def _take_again(self, window: Window, digest: bytes | None) -> None:
        """A second copy of the last turn: never computed again, never silently answered for other bytes."""
        for item in (*self._running, *self._waiting):
            if item.turn == window.turn and not item.stale:
                if item.input_digest != digest and not item.cancelled:
                    self.complain(
                        SessionFault("conflict", "another input for a turn that is being computed"), window.turn
                    )
                return
        entry = self.journal.answer_to(window.turn)
        if entry is None:
            if window.turn == self._emptied:
                self._pass_on_empty(window.turn, window.position, window.tokens, window.want, digest)
            else:
                self._gapped = False
                self._say_gap(window)
        elif entry.input_digest != digest or entry.want != window.want or entry.position != window.position:
            self.complain(SessionFault("conflict", "another input for a turn that was answered"), window.turn)
        else:
            self._pass_on(entry)

    def _say_gap(self, window: Window) -> None:
        """Once until a window fits again: what follows a gap lies beyond it too."""
        if self._gapped:
            return
        self._gapped = True
        gap = Gap(self.order.session, self.epoch, self.order.hop_index, 0, window.turn, self._end)
        self.tell(gap)
        if self.order.hop_index > 0 and self.data is not None:
            self._commands.append(Reply(self.data, gap.to_message(self._self_peer, self.predecessor)))

    def _pump(self) -> None:
        """Give the device what it may have; pass on cancelled windows when nothing is before them."""
        waiting, running = self._waiting, self._running
        while waiting:
            item = waiting[0]
            if item.cancelled or item.hidden is None:
                if running:
                    return
                waiting.popleft()
                self._pass_on_empty(item.turn, item.position, item.tokens, item.want, item.input_digest)
                continue
            if len(running) >= limits.DEVICE_WINDOWS:
                return
            waiting.popleft()
            item.job = SpanJob(
                self.grant.model_key,
                self.lease,
                self.span,
                item.position,
                item.tokens,
                item.hidden,
                self.order.max_tokens,
                self._rows_kept(item),
                JobPriority.DECODE if item.tokens == 1 else JobPriority.PREFILL,
                self._prompts_at(item.position),
            )
            item.hidden = None
            self._applied_end = item.position + item.tokens
            running.append(item)
            self._commands.append(Submit(item.job))

    def _prompts_at(self, position: int) -> Part | None:
        prompts = self.order.prompts
        return prompts if prompts is not None and position < prompts.shape[1] else None

    def _rows_kept(self, item: _Item) -> int:
        if not self.is_last or item.want == "all":
            return -1
        if item.want == "last":
            return 1
        return 0 if item.want == "none" else item.position + item.tokens - item.want[0]

    def job_done(self, result: JobResult) -> None:
        """The device finished the oldest window that it had of this session."""
        running = self._running
        if not running or running[0].job is not result.job:
            return  # of a session that was closed and opened again under the same lease
        item = running.popleft()
        if item.stale:
            self._pump()
            return
        hidden = self._trim(item, result.hidden)
        if result.error is not None or (hidden is None and self._rows_kept(item) != 0):
            error = result.error or SessionFault("compute-failed", "the device gave no result")
            self._fail(item, error)
            return
        self.windows_done += 1
        self.journal.truncate(item.position)
        if item.cancelled:
            self._pass_on_empty(item.turn, item.position, item.tokens, item.want, item.input_digest)
        else:
            entry = Entry(item.turn, item.position, item.tokens, item.want, item.input_digest, hidden)
            self.journal.append(entry)
            self._pass_on(entry)
        if self._waiting:
            self._pump()

    def _trim(self, item: _Item, hidden: Part | None) -> Part | None:
        """The rows that go on, of those that the device kept."""
        if hidden is None or (self.is_last and item.want == "none"):
            return None
        if not self.is_last or isinstance(item.want, str):
            return hidden
        rows = item.want[1] - item.want[0]
        view = memoryview(hidden.data).cast("B")[: rows * self._token_bytes]
        return Part("hidden", hidden.dtype, (rows, self.grant.width), view)

    def _fail(self, item: _Item, error: PeerdError) -> None:
        """A window could not be computed: what comes after it has nothing to stand on."""
        self._drop_windows()
        self._forget_kv(self._turn)
        self.complain(error, item.turn)

    def _pass_on(self, entry: Entry) -> None:
        order = self.order
        lane: Window | Result
        if self.is_last:
            lane = Result(
                order.session, self.epoch, order.hop_index, 0, entry.turn, entry.position, entry.tokens, entry.want,
                order.model, order.compute_class, order.adapter, entry.input_digest, entry.hidden,
            )  # fmt: skip
        else:
            lane = Window(
                order.session, self.epoch, order.hop_index + 1, 0, entry.turn, entry.position, entry.tokens,
                entry.want, order.model, order.compute_class, order.adapter, entry.input_digest, entry.hidden,
            )  # fmt: skip
        self._commands.append(
            SendNext(
                EdgeKey(order.session, order.hop_index, self.epoch), lane.to_message(self._self_peer, self.successor)
            )
        )

    def _pass_on_empty(self, turn: int, position: int, tokens: int, want: Want, digest: bytes | None) -> None:
        """A cancelled window goes round without rows: its credit comes back by the one way there is."""
        order = self.order
        self._emptied = turn
        lane: Window | Result
        if self.is_last:
            lane = Result(
                order.session, self.epoch, order.hop_index, 0, turn, position, tokens, want,
                order.model, order.compute_class, order.adapter, digest, None, True,
            )  # fmt: skip
        else:
            lane = Window(
                order.session, self.epoch, order.hop_index + 1, 0, turn, position, tokens, want,
                order.model, order.compute_class, order.adapter, digest, None,
            )  # fmt: skip
        self._commands.append(
            SendNext(
                EdgeKey(order.session, order.hop_index, self.epoch), lane.to_message(self._self_peer, self.successor)
            )
        )

    # --- the rest of the table ---

    def cancel(self, turn: int) -> None:
        """Raise the watermark; what waits under it isn't started, what runs isn't passed on with its rows."""
        self._watermark = max(self._watermark, turn)
        for item in (*self._running, *self._waiting):
            if item.turn <= self._watermark and not item.cancelled:
                item.cancelled = True
                item.hidden = None
        ends = [item.position + item.tokens for item in self._waiting if not item.cancelled]
        self._end = ends[-1] if ends else self._applied_end
        self._pump()

    def resend(self, gap: Gap) -> None:
        """Fill the successor's gap from the journal, if it holds all of it within one round of credits."""
        entries = self.journal.covering(gap.have)
        if entries and len(entries) <= self.grant.windows and any(entry.turn == gap.turn for entry in entries):
            for entry in entries:
                self._pass_on(entry)

    def pass_refusal(self, error: SessionError) -> None:
        """The successor refused what came over our edge: its driver hears it from us, once an epoch."""
        self.report(error.hop_index, error.code, error.message)

    def report(self, edge: int, code: str, message: str) -> None:
        if edge not in self._reported:
            self._reported.append(edge)
            self.tell(Report(self.order.session, self.epoch, self.order.hop_index, edge, code, message))

    def refuse_input(self, window: Window, fault: SessionFault) -> None:
        """A window that must not count: bad bounds, or a signature found false while it was being computed."""
        for item in (*self._running, *self._waiting):
            if item.turn == window.turn:
                self._drop_windows()
                self._forget_kv(self._turn)
                break
        index = self.order.hop_index
        if index == 0:
            self.complain(fault, window.turn)
        else:
            self.report(index - 1, fault.code, str(fault))

    def kv_dropped(self) -> None:
        """The node took this lease's KV back: the next window is a gap from 0."""
        self._drop_windows()
        self._forget_kv()

    def beat(self, steps: int, queue: int, now: float) -> None:
        self.beat_at = now + self.order.heartbeat_s
        oldest = next((item.came_at for item in (*self._running, *self._waiting) if not item.stale), None)
        age_s = None if oldest is None else max(0.0, now - oldest)
        self.tell(Heartbeat(self.order.session, self.epoch, self.order.hop_index, self._boot_id, steps, queue, age_s))

    def leave(self, deadline_s: float) -> None:
        self.tell(Leaving(self.order.session, self.epoch, self.order.hop_index, deadline_s))

    def complain(self, error: PeerdError, turn: int | None = None) -> None:
        """Say `error` to the driver."""
        meaning = CODES.get(error.code, UNKNOWN)
        retry_after_s = error.retry_after_s if isinstance(error, SessionFault) else None
        self.tell(
            SessionError(
                self.order.session, self.epoch, self.order.hop_index, error.code, str(error), meaning.retryable,
                retry_after_s, turn,
            )
        )  # fmt: skip

    def tell(self, message: Envelope) -> None:
        """Send to the driver, unless its channel is gone."""
        if self.phase is HopPhase.OPEN:
            wire: Message = message.to_message(self._self_peer, self.driver)
            self._commands.append(Reply(self.control, wire))

    @property
    def prompts_bytes(self) -> int:
        """What the deep prompts of its order take."""
        prompts = self.order.prompts
        return 0 if prompts is None else prompts.size_bytes

    @property
    def windows_held(self) -> int:
        return len(self._running) + len(self._waiting)

    def _drop_windows(self) -> None:
        self._waiting.clear()
        for item in self._running:
            item.stale = True

    def _forget_kv(self, last_turn: int = 0) -> None:
        """Hold nothing; turns up to ``last_turn`` were accepted once and are not to be again."""
        self.journal.clear()
        self._turn = last_turn
        self._emptied = 0
        self._end = 0
        self._applied_end = 0
        self._gapped = False
