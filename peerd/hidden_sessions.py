"""Sessions that are fed hidden states instead of tokens: somebody else owns embeddings, head and sampling.

Owns the journal of what each session was given, from which a lost route is made good with the same bits, and the bounds on journals and
on idle sessions. Routes are `peerd.driving`'s. Knows neither HTTP nor what the states mean. docs/training.md, section 5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from blocks.protocol.commands import Output, RouteReady
from blocks.protocol.messages import Want
from overlay.errors import Blame, PeerdError
from overlay.rpc.types import DTYPE_BYTES, Part
from peerd.driving import DriverModel, RouteWish, SessionRoute, Surroundings
from routing.types import Route

WINDOW_TOKENS = 512
"""Of one window: long enough to be compute-bound, short enough for others to get in between."""
IDLE_S = 60.0
"""How long a session lives from its last step."""
SESSIONS_MAX = 256
JOURNALS_BYTES_MAX = 1 << 30
"""Hidden states and deep prompts that all sessions together keep."""
RETRY_AFTER_S = 5

Rows = Literal["all", "last"]
OnClose = Callable[["HiddenSession"], None]


class UnknownSession(PeerdError):
    """There is no such session, or not any more."""

    code = "unknown-session"
    exit_code = 2
    http_status = 404
    blame = Blame.USER


class SessionConflict(PeerdError):
    """A step that doesn't fit where the session is; nothing changed."""

    code = "session-conflict"
    exit_code = 2
    http_status = 409
    blame = Blame.USER

    def __init__(self, message: str, length: int) -> None:
        super().__init__(message)
        self.length = length


class SessionsFull(PeerdError):
    """More sessions, or more of their hidden states, than this node keeps at once."""

    code = "busy"
    exit_code = 64
    http_status = 503
    retryable = True

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.retry_after_s = RETRY_AFTER_S


@dataclass(slots=True)
class _Chunk:
    """Hidden states of one step. ``kept`` of its tokens count; the others were computed with them, so a replay does it again."""

    position: int
    hidden: Part
    kept: int

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def drop_tail(self) -> int:
        """Keep what counts; returns how many bytes that frees. A replay may then differ in the last bit."""
        before = self.hidden.size_bytes
        rows = self.rows(0, self.kept)
        self.hidden = Part(rows.name, rows.dtype, rows.shape, bytes(rows.data))
        return before - rows.size_bytes

    def rows(self, first: int, count: int) -> Part:
        """(count, d_model) from the chunk's token ``first`` on, without a copy."""
        width = self.hidden.shape[1]
        row_bytes = width * DTYPE_BYTES[self.hidden.dtype]
        data = memoryview(self.hidden.data).cast("B")[first * row_bytes : (first + count) * row_bytes]
        return Part("hidden", self.hidden.dtype, (count, width), data)


@dataclass(slots=True)
class _Step:
    """The step under way: ``turns`` are its windows that are not answered, ``rows`` what came of the others."""

    want: Rows
    done: asyncio.Future[list[Part]]
    turns: list[int] = field(default_factory=list)
    rows: list[Part] = field(default_factory=list)
    all_sent: bool = False


class JournalRoom:
    """The bytes of all journals together."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Raises SessionsFull."""
        if self.used_bytes + size_bytes > self.bytes_max:
            raise SessionsFull(
                f"The open sessions keep {self.used_bytes >> 20} MiB of hidden states, of {self.bytes_max >> 20} that there may be; "
                "close one, or try again when some have expired."
            )
        self.used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes


class HiddenSession:
    """One session. `step` may be cancelled at any time; `close` frees everything."""

    def __init__(self, around: Surroundings, wish: RouteWish, journals: JournalRoom, on_close: OnClose) -> None:
        self.model: DriverModel = wish.model
        self.max_tokens = wish.max_tokens
        self.length = 0
        self.closed = False
        self._journals = journals
        self._on_close = on_close
        self._prompts_bytes = 0 if wish.prompts is None else wish.prompts.size_bytes
        journals.take(self._prompts_bytes)
        self._chunks: list[_Chunk] = []
        self._step: _Step | None = None
        self._window_tokens = WINDOW_TOKENS
        self._sent_chunks = 0
        """Of these everything was sent on the present route; of the next, ``_sent_tokens``."""
        self._sent_tokens = 0
        self._expiry: asyncio.TimerHandle | None = None
        self._route = SessionRoute(around, wish, self)
        self.session = self._route.session
        self._route.begin("hidden session")
        self._wait_for_steps()

    @property
    def replays(self) -> int:
        """How often the session moved to another route."""
        return self._route.replays

    @property
    def route(self) -> Route | None:
        return self._route.route

    async def step(self, hidden: Part, position: int, want: Rows) -> list[Part]:
        """Run new states through the blocks.

        Args:
            hidden: (tokens, d_model) in the compute dtype.
            position: of the first; below the session's length what follows is forgotten first.
            want: the rows that come back.

        Returns:
            The rows in order, in one or more parts of shape (rows, d_model).

        Raises:
            SessionConflict: a step is under way, or ``position`` is past the end; nothing changed.
            SessionsFull: there is no room for what the step brings; nothing changed.
            PeerdError: there was no route in time; the session's length is ``position``, and the step may be tried again.
        """
        self._check(hidden.shape[0], position)
        self._journals.take(hidden.size_bytes)
        if self._expiry is not None:
            self._expiry.cancel()
        self._truncate(position)
        chunk = _Chunk(position, hidden, hidden.shape[0])
        self._chunks.append(chunk)
        step = self._step = _Step(want, asyncio.get_running_loop().create_future())
        try:
            if self._route.flowing is None:
                self._route.want()
            elif self._route.is_moving:
                self._route.leave()
            else:
                self._send_more()
            rows = await step.done
            self.length = position + chunk.tokens
            return rows
        finally:
            self._step = None
            if self.length != position + chunk.tokens:
                self._truncate(position)
            if not self.closed:
                self._wait_for_steps()

    def close(self, error: PeerdError | None = None) -> None:
        """Free every hop now; a step under way ends with ``error``. Harmless when closed."""
        if self.closed:
            return
        self.closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._route.end()
        self._fail(error or _unknown())
        self._truncate(0)
        self._journals.give_back(self._prompts_bytes)
        self._on_close(self)

    def _wait_for_steps(self) -> None:
        self._expiry = asyncio.get_running_loop().call_later(IDLE_S, self.close)

    def _check(self, tokens: int, position: int) -> None:
        if self.closed:
            raise _unknown()
        if self._step is not None:
            raise SessionConflict("A step of this session is under way; wait for its answer.", self.length)
        if position > self.length:
            raise SessionConflict(
                f"The session has {self.length} tokens, so position {position} leaves a gap.", self.length
            )
        if position + tokens > self.max_tokens:
            raise SessionConflict(
                f"The session was opened for {self.max_tokens} tokens, and this step would reach {position + tokens}.",
                self.length,
            )

    # --- the journal ---

    def _truncate(self, position: int) -> None:
        """Forget what is at ``position`` and after it; of a chunk that lies across it the rest stays, within bounds."""
        chunks = self._chunks
        while chunks and chunks[-1].position >= position:
            self._journals.give_back(chunks.pop().hidden.size_bytes)
        if chunks and position < chunks[-1].position + chunks[-1].kept:
            last = chunks[-1]
            last.kept = position - last.position
            if sum(chunk.tokens - chunk.kept for chunk in chunks) > self.max_tokens:
                self._journals.give_back(last.drop_tail())
        self.length = min(self.length, position)
        sent, count = self._sent_chunks, len(chunks)
        is_tail_gone = sent == count - 1 and self._sent_tokens >= chunks[-1].tokens
        if sent > count or (sent == count and self._sent_tokens) or is_tail_gone:
            self._sent_chunks, self._sent_tokens = count, 0

    def _send_more(self) -> None:
        """Send what the route has not seen, while its credits have room."""
        step, route = self._step, self._route
        if step is None:
            return
        while route.flowing is not None and self._sent_chunks < len(self._chunks):
            if (self._sent_chunks or self._sent_tokens) and route.room == 0:
                return
            index, first = self._sent_chunks, self._sent_tokens
            chunk = self._chunks[index]
            count = min(self._window_tokens, chunk.tokens - first)
            is_new = index == len(self._chunks) - 1
            is_end = first + count == chunk.tokens
            self._sent_chunks, self._sent_tokens = (index + 1, 0) if is_end else (index, first + count)
            want: Want = "none"
            if is_new:
                want = step.want if is_end or step.want == "all" else "none"
                step.all_sent = is_end
            turn = route.submit(chunk.rows(first, count), chunk.position + first, count, want)
            if is_new:
                step.turns.append(turn)

    # --- RouteUser ---

    def route_ready(self, ready: RouteReady) -> None:
        self._window_tokens = min(WINDOW_TOKENS, ready.window_tokens)
        self._sent_chunks = self._sent_tokens = 0
        if self._step is not None:
            self._step.turns.clear()
            self._step.rows.clear()
            self._step.all_sent = False
        self._send_more()

    def route_output(self, output: Output) -> None:
        step = self._step
        if step is not None and output.turn in step.turns:
            step.turns.remove(output.turn)
            if output.hidden is not None:
                step.rows.append(output.hidden)
            if step.all_sent and not step.turns and not step.done.done():
                step.done.set_result(step.rows)
                return
        self._send_more()

    def route_lost(self, error: PeerdError) -> None:
        if self._step is None:
            self._route.rest()
        self._route.leave()

    def route_waits(self, error: PeerdError) -> None:
        """Whoever asked for the step waits; there is nobody to tell."""

    def route_failed(self, error: PeerdError | None) -> None:
        if self._route.is_dead:
            self.close(error)
        else:
            self._fail(error)

    def _fail(self, error: PeerdError | None) -> None:
        step = self._step
        if step is not None and not step.done.done():
            step.done.set_exception(error or PeerdError("The session failed inside this daemon; see its log."))


class HiddenSessions:
    """All of a node's; `close_all` before the node stops."""

    def __init__(self) -> None:
        self._sessions: dict[str, HiddenSession] = {}
        self.journals = JournalRoom(JOURNALS_BYTES_MAX)

    def open(self, around: Surroundings, wish: RouteWish) -> HiddenSession:
        """Begin a session, whose route is looked for at once. Raises SessionsFull."""
        if len(self._sessions) >= SESSIONS_MAX:
            raise SessionsFull(f"{SESSIONS_MAX} sessions are open; close one, or wait until one has expired.")
        session = HiddenSession(around, wish, self.journals, self._closed)
        self._sessions[session.session.hex()] = session
        return session

    def get(self, name: str) -> HiddenSession:
        """By its id in hex. Raises UnknownSession."""
        found = self._sessions.get(name)
        if found is None:
            raise _unknown()
        return found

    def running(self) -> tuple[HiddenSession, ...]:
        """Those that are open."""
        return tuple(self._sessions.values())

    def close_all(self, error: PeerdError) -> None:
        """End every session; steps under way end with ``error``."""
        for session in self.running():
            session.close(error)

    def _closed(self, session: HiddenSession) -> None:
        self._sessions.pop(session.session.hex(), None)


def _unknown() -> UnknownSession:
    return UnknownSession(f"There is no such session; one ends {IDLE_S:.0f} seconds after its last step. Open another.")
