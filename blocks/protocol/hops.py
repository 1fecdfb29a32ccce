"""Every session that this node serves: who may say what to which, and when each ends.

Owns the authority checks, tombstones, held windows, leases and draining of `docs/protocol.md` section 4.1; one
session's windows are `hop.HopSession`'s. Must not know streams (channels are opaque, hashable handles that commands
name back), models or devices (asked through the `Admission` and `Gauge` ports). No clock: `now` is a parameter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from blocks.protocol import limits
from blocks.protocol.admission import Admission, Gauge, Grant, Wish
from blocks.protocol.cells import HOP_CELLS, Age, HopPhase, HopRule
from blocks.protocol.coded_faults import UNKNOWN
from blocks.protocol.commands import CloseChannel, EdgeKey, HopCommand, Reply
from blocks.protocol.decoding import decode
from blocks.protocol.device import JobResult, LeaseKey, SpanJob
from blocks.protocol.held import HeldWindow, HeldWindows
from blocks.protocol.hop import HopSession
from blocks.protocol.journal import JournalRoom, bound_together
from blocks.protocol.messages import (
    Cancel,
    Envelope,
    Epoch,
    Gap,
    Open,
    Reserved,
    SessionError,
    SessionMessage,
    Window,
)
from blocks.protocol.session_errors import CODES, BadMessage, SessionFault
from overlay.errors import PeerdError
from overlay.rpc.types import Message, Part

Place = tuple[bytes, int]
"""(session, hop index): what a session's state is keyed by, since one peer may be two hops."""


@dataclass(frozen=True, slots=True)
class HopSettings:
    """``boot_id``: 16 random bytes of this process; a driver that sees it change knows that the KV is gone."""

    self_peer: bytes
    boot_id: bytes
    sessions_max: int = limits.SESSIONS_MAX
    journals_bytes_max: int = limits.JOURNALS_BYTES_MAX


@dataclass(frozen=True, slots=True)
class _Tombstone:
    epoch: Epoch
    driver: bytes
    until: float


@dataclass(frozen=True, slots=True)
class HopsStatistics:
    """A snapshot for people and metrics."""

    sessions: int
    lingering: int
    windows_held: int
    windows_early: int
    windows_done: int
    journal_bytes: int
    tombstones: int
    refused: tuple[tuple[str, int], ...]


class Hops:
    """The serving side of the session protocol. Nothing that a peer sends raises."""

    def __init__(self, settings: HopSettings, admission: Admission, gauge: Gauge) -> None:
        self._settings = settings
        self._admission = admission
        self._gauge = gauge
        self._sessions: dict[Place, HopSession] = {}
        self._controls: dict[object, Place] = {}
        self._tombstones: dict[Place, _Tombstone] = {}
        self._held = HeldWindows()
        self._journals = JournalRoom()
        self._refused: Counter[str] = Counter()
        self._commands: list[HopCommand] = []
        self._tick_at: float | None = None
        self._draining = False
        self._drain_until = 0.0
        self._windows_done = 0

    # --- what the shell tells ---

    def receive(self, message: Message, origin: bytes, channel: object, now: float) -> None:
        """Take one message that ``origin``, the connection's authenticated peer, sent on ``channel``."""
        try:
            decoded = decode(message)
        except BadMessage as error:
            self._refuse(error.code, channel)
            return
        cells = HOP_CELLS.get("reserved" if isinstance(decoded, Reserved) else message.kind)
        if cells is None or message.sender != origin:
            self._refuse("not-authorised" if cells else "bad-message", channel)
            return
        backwards = isinstance(decoded, Gap | SessionError)  # named after the hop that they come from
        place = (decoded.session, decoded.hop_index - 1 if backwards else decoded.hop_index)
        session = self._sessions.get(place)
        if session is None:
            self._receive_at_nothing(decoded, message, origin, channel, now)
            return
        epoch = session.epoch
        age = Age.EQUAL if decoded.epoch == epoch else Age.LOWER if decoded.epoch < epoch else Age.HIGHER
        rule = cells[age]
        if rule is HopRule.IGNORE:
            return  # what changes nothing needs no authority: late copies come from peers that have left the route
        if rule is HopRule.HOLD and isinstance(decoded, Window):
            self._hold(HeldWindow(message, decoded, origin, channel, now + limits.HELD_S))
            return
        if origin != self._authority(session, decoded, backwards):
            self._refuse("not-authorised", channel)
            return
        if rule is HopRule.WINDOW and isinstance(decoded, Window):
            try:
                session.take_window(decoded, channel, message.header_bytes is not None, now)
            except SessionFault as fault:
                self._end(place, session, fault, now)
            return
        self._apply(rule, session, decoded, channel, now)

    def job_done(self, result: JobResult, now: float) -> None:
        """A job of `Submit` ended; ``result.job`` is that very object."""
        job = result.job
        if not isinstance(job, SpanJob):
            return
        session = self._sessions.get((job.lease.session, job.lease.hop_index))
        if session is None:
            return
        session.job_done(result)
        if self._journals.used_bytes > self._settings.journals_bytes_max:
            bound_together([other.journal for other in self._sessions.values()], self._settings.journals_bytes_max)

    def channel_lost(self, channel: object, now: float) -> None:
        """A channel ended. A session's control channel: its KV waits for the driver until the lease ends."""
        place = self._controls.pop(channel, None)
        session = None if place is None else self._sessions.get(place)
        if session is not None and session.control == channel and session.phase is HopPhase.OPEN:
            session.heard_at = now
            session.enter(HopPhase.LINGERING)

    def next_lost(self, edge: EdgeKey, error: PeerdError, now: float) -> None:
        """The data stream of ``edge`` could not be opened, or ended unasked."""
        session = self._sessions.get((edge.session, edge.hop_index))
        if session is not None and session.edge == edge:
            session.report(edge.hop_index + 1, error.code, str(error))

    def refuse(self, message: Message, channel: object, error: PeerdError, now: float) -> None:
        """The shell found a window false (its signature) after `receive` had taken it: its output must not leave."""
        try:
            window = decode(message)
        except BadMessage:
            return  # then it was refused at once
        session = self._sessions.get((window.session, window.hop_index))
        self._refuse(error.code, channel)
        if session is not None and isinstance(window, Window) and window.epoch == session.epoch:
            session.refuse_input(window, SessionFault("bad-signature", str(error)))

    def lease_dropped(self, lease: LeaseKey) -> None:
        """The node took back the KV of an idle lease: the driver hears of it as a gap, and replays."""
        session = self._sessions.get((lease.session, lease.hop_index))
        if session is not None:
            session.kv_dropped()

    def drain(self, deadline_s: float, now: float) -> None:
        """Take no more sessions; tell every driver to move; end what is left after ``deadline_s``."""
        self._draining = True
        self._drain_until = now + deadline_s
        for session in self._sessions.values():
            session.leave(deadline_s)
        self._wake(now)

    # --- time ---

    def next_timeout(self) -> float | None:
        return self._tick_at

    def on_timeout(self, now: float) -> None:
        """Beat, end leases, let go of what was held. Early calls are harmless."""
        if self._tick_at is None or now < self._tick_at:
            return
        late_s = now - self._tick_at
        steps, queue = self._gauge.step_count, self._gauge.queue_depth
        for place, session in tuple(self._sessions.items()):
            if late_s > session.order.heartbeat_s:
                session.heard_at += late_s  # our own loop stood still: the driver isn't to blame
            if self._draining and now >= self._drain_until:
                self._end(place, session, SessionFault("draining", "this server has left"), now)
            elif now - session.heard_at > session.lease_s:
                self._end(place, session, SessionFault("lease-expired", "the driver was not heard of"), now)
            elif session.phase is HopPhase.OPEN and now >= session.beat_at:
                session.beat(steps, queue, now)
        for held in self._held.take_expired(now):
            self._say_unknown_epoch(held)
        for place, stone in tuple(self._tombstones.items()):
            if stone.until > now:
                break  # in order of their making
            del self._tombstones[place]
        self._tick_at = None
        if self._sessions or self._tombstones or len(self._held):
            self._wake(now)

    def poll_commands(self) -> list[HopCommand]:
        commands = self._commands[:]
        self._commands.clear()  # the very list is shared with the sessions
        return commands

    # --- what people see ---

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    @property
    def is_drained(self) -> bool:
        return self._draining and not self._sessions

    def statistics(self) -> HopsStatistics:
        sessions = self._sessions.values()
        return HopsStatistics(
            len(self._sessions),
            sum(1 for session in sessions if session.phase is HopPhase.LINGERING),
            sum(session.windows_held for session in sessions),
            len(self._held),
            self._windows_done + sum(session.windows_done for session in sessions),
            self._journals.used_bytes,
            len(self._tombstones),
            tuple(sorted(self._refused.items())),
        )

    # --- the cells of section 4.1 ---

    def _authority(self, session: HopSession, message: SessionMessage, backwards: bool) -> bytes:
        if isinstance(message, Window):
            return session.predecessor
        return session.successor if backwards else session.driver

    def _apply(self, rule: HopRule, session: HopSession, decoded: SessionMessage, channel: object, now: float) -> None:
        if rule is HopRule.RESEND and isinstance(decoded, Gap):
            session.resend(decoded)
            return
        if rule is HopRule.PASS_REFUSAL and isinstance(decoded, SessionError):
            session.pass_refusal(decoded)
            return
        session.heard_at = now
        if rule is HopRule.CANCEL and isinstance(decoded, Cancel):
            session.cancel(decoded.turn)
        elif rule is HopRule.CLOSE:
            self._forget((decoded.session, decoded.hop_index), session, decoded.epoch, now)
        elif rule is HopRule.UNSUPPORTED:
            self._answer_unsupported(decoded, session.driver, channel)
        elif isinstance(decoded, Open):
            self._on_open(rule, session, decoded, channel, now)

    def _on_open(self, rule: HopRule, session: HopSession, order: Open, channel: object, now: float) -> None:
        driver = session.driver
        if rule is HopRule.OPEN_STALE:
            self._answer_stale(order, session.epoch, driver, channel)
        elif rule is HopRule.OPEN_NEWER:
            self._place(order, driver, session, channel, now)
        elif order == session.order:
            self._controls.pop(session.control, None)
            self._controls[channel] = (order.session, order.hop_index)
            session.resume(channel, now)
        else:
            self._answer(channel, order, driver, SessionFault("conflict", "another route under the same epoch"))

    def _receive_at_nothing(
        self, decoded: SessionMessage, message: Message, origin: bytes, channel: object, now: float
    ) -> None:
        """No session at this place: it was never opened, or it is closed."""
        stone = self._tombstones.get((decoded.session, decoded.hop_index))
        if isinstance(decoded, Open):
            if stone is not None and stone.driver != origin:
                self._refuse("not-authorised", channel)
            elif stone is not None and decoded.epoch <= stone.epoch:
                self._answer_stale(decoded, stone.epoch, origin, channel)
            else:
                self._place(decoded, origin, None, channel, now)
        elif isinstance(decoded, Window):
            if stone is None or decoded.epoch > stone.epoch:
                self._hold(HeldWindow(message, decoded, origin, channel, now + limits.HELD_S))
                self._wake(now)
        elif isinstance(decoded, Reserved):
            self._answer_unsupported(decoded, origin, channel)

    def _place(self, order: Open, driver: bytes, session: HopSession | None, channel: object, now: float) -> None:
        """Give the session its place in a new route, or say why not; then nothing of it is left here."""
        place = (order.session, order.hop_index)
        lease = LeaseKey(order.session, order.hop_index)
        grant = self._admit(order, driver, session, lease)
        if isinstance(grant, PeerdError):
            if session is not None:
                self._forget(place, session, order.epoch, now, admitted=False)
            self._answer(channel, order, driver, grant)
            return
        if session is None:
            settings, commands = self._settings, self._commands
            session = HopSession(settings.self_peer, settings.boot_id, driver, lease, commands, self._journals)
            self._sessions[place] = session
        else:
            self._controls.pop(session.control, None)
        self._tombstones.pop(place, None)
        self._controls[channel] = place
        session.open(order, grant, channel, now)
        self._wake(now)
        for held in self._held.take(order.session, order.hop_index, order.epoch):
            self.receive(held.message, held.origin, held.channel, now)

    def _admit(self, order: Open, driver: bytes, session: HopSession | None, lease: LeaseKey) -> Grant | PeerdError:
        """A new epoch gives its former grant back first: its span or length may be another."""
        hop = order.route[order.hop_index]
        if session is not None:
            self._admission.release(lease)
        if hop.peer != self._settings.self_peer:
            return SessionFault("bad-message", "this place in the route is another peer's")
        if self._draining:
            return SessionFault("draining", "this server is leaving")
        if session is None:
            mine = sum(1 for other in self._sessions.values() if other.driver == driver)
            if len(self._sessions) >= self._settings.sessions_max or mine >= limits.SESSIONS_PER_DRIVER_MAX:
                return SessionFault("busy", "this server holds as many sessions as it can", 1.0)
        fault = self._prompts_fault(order, driver, session)
        if fault is not None:
            return fault
        wish = Wish(order.model, order.compute_class, order.adapter, hop.span, order.max_tokens)
        grant = self._admission.admit(lease, wish)
        if isinstance(grant, Grant) and not _fits(order.prompts, grant):
            self._admission.release(lease)
            return SessionFault("bad-window", f"prompts here are {grant.width} wide, of {grant.dtype}")
        return grant

    def _prompts_fault(self, order: Open, driver: bytes, session: HopSession | None) -> SessionFault | None:
        """Whether there is room for an order's deep prompts beside those of other sessions."""
        if order.prompts is None:
            return None
        former = 0 if session is None else session.prompts_bytes
        if self.has_room_for_prompts(driver, order.prompts.size_bytes - former):
            return None
        return SessionFault("busy", "this server holds as many deep prompts as it can", 1.0)

    def has_room_for_prompts(self, driver: bytes, size_bytes: int) -> bool:
        """Whether ``size_bytes`` more of deep prompts may come in from ``driver``."""
        whole = mine = size_bytes
        for session in self._sessions.values():
            whole += session.prompts_bytes
            mine += session.prompts_bytes if session.driver == driver else 0
        return whole <= limits.PROMPTS_BYTES_MAX and mine <= limits.PROMPTS_BYTES_PER_DRIVER_MAX

    def turn_away(self, message: Message, origin: bytes, channel: object) -> None:
        """An `open` whose deep prompts there is no room for, before they are read: ``message`` is its header alone."""
        try:
            order = decode(message)
        except BadMessage as error:
            self._refuse(error.code, channel)
            return
        if isinstance(order, Open) and message.sender == origin:
            fault = SessionFault("busy", "this server holds as many deep prompts as it can", 1.0)
            self._answer(channel, order, origin, fault)
        else:
            self._refuse("bad-message", channel)

    # --- ends ---

    def _end(self, place: Place, session: HopSession, fault: SessionFault, now: float) -> None:
        """This side ends the session: its driver is told, if it can be."""
        self._refused[fault.code] += 1
        session.complain(fault)
        self._forget(place, session, session.epoch, now)

    def _forget(self, place: Place, session: HopSession, epoch: Epoch, now: float, *, admitted: bool = True) -> None:
        """Free everything but a tombstone, which keeps late copies from raising the dead."""
        self._windows_done += session.windows_done
        session.close()
        if admitted:
            self._admission.release(session.lease)
        self._controls.pop(session.control, None)
        del self._sessions[place]
        self._tombstones.pop(place, None)
        self._tombstones[place] = _Tombstone(epoch, session.driver, now + limits.TOMBSTONE_S)
        while len(self._tombstones) > limits.TOMBSTONES_MAX:
            del self._tombstones[next(iter(self._tombstones))]

    # --- refusals ---

    def _refuse(self, code: str, channel: object) -> None:
        """What breaks the rules ends the channel that it came on, and changes nothing else."""
        self._refused[code] += 1
        self._commands.append(CloseChannel(channel, code))

    def _hold(self, held: HeldWindow) -> None:
        if not self._held.hold(held):
            self._say_unknown_epoch(held)

    def _say_unknown_epoch(self, held: HeldWindow) -> None:
        fault = SessionFault("unknown-epoch", "no open of this epoch came")
        self._answer(held.channel, held.window, held.origin, fault, held.window.turn)

    def _answer_stale(self, order: Open, known: Epoch, driver: bytes, channel: object) -> None:
        if order.epoch.incarnation < known.incarnation:
            fault = SessionFault("fenced", "a newer start of this driver owns the session")
        else:
            fault = SessionFault("stale-epoch", "this epoch was left")
        self._answer(channel, order, driver, fault)

    def _answer_unsupported(self, message: Envelope, peer: bytes, channel: object) -> None:
        self._answer(channel, message, peer, SessionFault("unsupported", "this version doesn't know the request"))

    def _answer(self, channel: object, to: Envelope, peer: bytes, error: PeerdError, turn: int | None = None) -> None:
        self._refused[error.code] += 1
        retry_after_s = error.retry_after_s if isinstance(error, SessionFault) else None
        retryable = CODES.get(error.code, UNKNOWN).retryable
        answer = SessionError(
            to.session, to.epoch, to.hop_index, error.code, str(error), retryable, retry_after_s, turn
        )
        self._commands.append(Reply(channel, answer.to_message(self._settings.self_peer, peer)))

    def _wake(self, now: float) -> None:
        tick_s = min((session.order.heartbeat_s / 4 for session in self._sessions.values()), default=limits.TICK_S)
        due = now + min(tick_s, limits.TICK_S)
        self._tick_at = due if self._tick_at is None else min(self._tick_at, due)


def _fits(prompts: Part | None, grant: Grant) -> bool:
    return prompts is None or (prompts.shape[2] == grant.width and prompts.dtype == grant.dtype)
