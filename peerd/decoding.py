"""The driver's shell: one session from prompt to last token, whatever happens to its servers.

Owns the loop of a token (result, sample and embed, window) as synchronous callbacks, the plan of each route, and the replay after a
loss: the whole token list on the next route, so that the caller sees a pause and the same text. What a session may say and when
a hop counts as lost is `blocks.protocol.driver`'s; which servers there are is the planner's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from blocks.protocol.commands import (
    CloseHops,
    Ended,
    Moving,
    OpenHop,
    Output,
    RouteLost,
    RouteReady,
    SendControl,
    SendData,
)
from blocks.protocol.device import Device, EmbedJob, JobPriority, JobResult, SampleJob
from blocks.protocol.driver import Driver, DriverSettings
from blocks.protocol.messages import Epoch
from blocks.protocol.session_errors import SessionFault
from blocks.sampling_params import SamplingParams
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.ports import Clock, Randomness
from overlay.rpc.types import Message, Part
from peerd.lanes import Lanes
from routing.types import ComputeClass, ModelId, Route

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Tokens of one prefill window: long enough to be compute-bound, short enough for others to get in between."""
AVOID_S = 20.0
RETRY_S = 0.25
RETRY_MAX_S = 2.0
ROUTES_MAX = 1000


class DecodeListener(Protocol):
    """Who asked; called synchronously on the loop's thread."""

    def on_token(self, token: int, logits: Part | None) -> bool:
        """A new token; False: stop here."""

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        """Nothing flows for now: ``planning``, ``waiting`` (for blocks or room) or ``replaying``."""

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        """Once: ``stop``, ``length``, ``cancelled`` or ``error``."""


class Planner(Protocol):
    """Who knows the swarm."""

    def plan(self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes]) -> Route:
        """A route now. Raises a retryable PeerdError while blocks are joining, another when nobody serves or loads them."""

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        """``peer`` (or its link to ``edge``) failed us."""

    def praise(self, peers: Sequence[bytes]) -> None:
        """A session ended well with these: what they did before is forgiven."""

    async def wait_changed(self, timeout_s: float) -> None:
        """Until the swarm looks different, or ``timeout_s``."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What is asked of a session. ``wait_s`` bounds each time that it has to wait for servers."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    want_logits: bool = False
    wait_s: float = 60.0


@dataclass(frozen=True, slots=True)
class DriverModel:
    """What a driver has to know of a model; ``key`` is the device's name for its head."""

    key: str
    model: ModelId
    compute_class: ComputeClass
    width: int
    max_positions: int


@dataclass(slots=True)
class DecodeTimes:
    """Loop seconds of the events that people ask about."""

    started: float
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True)
class _Avoided:
    until: dict[bytes, float] = field(default_factory=dict)

    def add(self, peer: bytes, until: float) -> None:
        self.until[peer] = until

    def now(self, now: float) -> tuple[bytes, ...]:
        return tuple(peer for peer, until in self.until.items() if until > now)


class DecoderPool:
    """Makes decodes and owns their tasks: ``async with DecoderPool(...)``; leaving it cancels what still runs."""

    def __init__(
        self,
        host: Host,
        service: SpanService,
        directory: SessionDirectory,
        device: Device,
        planner: Planner,
        clock: Clock,
        randomness: Randomness,
        incarnation: int,
    ) -> None:
        self.host = host
        self.service = service
        self.directory = directory
        self.device = device
        self.planner = planner
        self.clock = clock
        self.randomness = randomness
        self.incarnation = incarnation
        self.tasks: asyncio.TaskGroup | None = None
        self._running: dict[bytes, Decode] = {}

    async def __aenter__(self) -> Self:
        self.tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for decode in list(self._running.values()):
            decode.cancel()
        assert self.tasks is not None
        await self.tasks.__aexit__(None, None, None)

    def running(self) -> tuple[Decode, ...]:
        """Sessions under way."""
        return tuple(self._running.values())

    def start(self, model: DriverModel, request: DecodeRequest, listener: DecodeListener) -> Decode:
        """Begin; everything else is told to ``listener``."""
        decode = Decode(self, model, request, listener)
        self._running[decode.session] = decode
        decode.begin()
        return decode

    def ended(self, decode: Decode) -> None:
        """A decode is over."""
        self._running.pop(decode.session, None)


class Decode:
    """One session under way. `cancel` is the only thing to call."""

    def __init__(self, pool: DecoderPool, model: DriverModel, request: DecodeRequest, listener: DecodeListener) -> None:
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError("a decode needs a prompt of at least one token, and at least one token to make")
        self._pool = pool
        self.model = self._model = model
        self._request = request
        self._listener = listener
        self.session = pool.randomness.token(16)
        self.tokens: list[int] = list(request.prompt)
        self.route: Route | None = None
        self.routes = 0
        self.times = DecodeTimes(pool.clock.now())
        self._avoided = _Avoided()
        self._ended = False
        self._flowing: Epoch | None = None
        self._sampling = False
        self._embedding = False
        self._next_position = 0
        self._chunk_tokens = PREFILL_TOKENS
        self._moving = False
        self._route_over = asyncio.Event()
        self._last_error: PeerdError | None = None
        self._stalled_at: float | None = pool.clock.now()
        """Since when nothing has come out: only so long does ``wait_s`` count."""
        self._barren_routes = 0
        self._executing = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        assert pool.tasks is not None, "use `async with DecoderPool(...)`"
        self._lanes = Lanes(pool.host, pool.service, pool.tasks, self)
        self._driver = Driver(
            DriverSettings(
                self.session,
                pool.incarnation,
                pool.host.peer_id.multihash,
                tuple(str(address.without_peer()) for address in pool.host.addresses),
                model.model,
                model.compute_class,
                len(request.prompt) + request.max_new_tokens,
                model.width,
                model.compute_class.dtype,
            )
        )

    @property
    def is_over(self) -> bool:
        """Whether `on_end` was called."""
        return self._ended

    @property
    def replays(self) -> int:
        """How often the session moved to another route."""
        return max(0, self.routes - 1)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self._request.prompt) :]

    def tokens_per_s(self) -> float | None:
        """From the first token to the last, or None before there are two."""
        times, count = self.times, len(self.output)
        if times.first_token is None or times.last_token is None or count < 2 or times.last_token <= times.first_token:
            return None
        return (count - 1) / (times.last_token - times.first_token)

    def begin(self) -> None:
        """Called by the pool."""
        self._pool.directory.add(self.session, self)
        assert self._pool.tasks is not None
        self._task = self._pool.tasks.create_task(self._run(), name=f"decode {self.session.hex()[:8]}")

    def cancel(self) -> None:
        """Stop now: every hop hears `close` before this returns to the loop. Harmless when over."""
        self._end("cancelled", None)

    # --- routes ---

    async def _run(self) -> None:
        """Plan, drive until the route is over, plan again."""
        while not self._ended and self.routes < ROUTES_MAX:
            route = await self._plan()
            if route is None or self._ended:
                return
            self._route_over.clear()
            self._moving = False
            self.route = route
            self.routes += 1
            self._driver.open(route, self._pool.clock.now())
            self._execute()
            await self._route_over.wait()
            await self._pause()
        self._end("error", self._last_error)

    async def _pause(self) -> None:
        """After routes that gave nothing, let the swarm change before the next: no spinning on a refusal."""
        self._barren_routes += 1
        if self._ended or self._barren_routes < 2:
            return
        delay_s = min(RETRY_S * 2 ** min(self._barren_routes - 2, 8), RETRY_MAX_S)
        await self._pool.planner.wait_changed(delay_s)

    async def _plan(self) -> Route | None:
        """A route; waits where waiting can help, and says so. None when the decode ended with an error."""
        clock, request = self._pool.clock, self._request
        if self._stalled_at is None:
            self._stalled_at = clock.now()
        deadline = self._stalled_at + request.wait_s
        if self._barren_routes and clock.now() > deadline:
            self._end("error", self._last_error)
            return None
        delay_s = RETRY_S
        while not self._ended:
            try:
                return self._pool.planner.plan(
                    self._model.model, self._model.compute_class, self._avoided.now(clock.now())
                )
            except PeerdError as error:
                left_s = deadline - clock.now()
                can_wait = error.retryable or self.routes > 0 or bool(self._avoided.now(clock.now()))
                if not can_wait or left_s <= 0:
                    self._end("error", error)
                    return None
                self._listener.on_waiting("waiting", error)
                await self._pool.planner.wait_changed(min(delay_s, left_s))
                if not self._avoided.now(clock.now()) or delay_s >= RETRY_MAX_S:
                    self._avoided.until.clear()
                delay_s = min(2 * delay_s, RETRY_MAX_S)
        return None

    def _on_lost(self, lost: RouteLost) -> None:
        route, now = self.route, self._pool.clock.now()
        assert route is not None
        error = self._last_error = lost.error
        self._flowing = None
        log.info("session %s lost its route: %s", self.session.hex()[:8], error)
        if lost.hop_index is not None:
            peer = self._peer_at(lost.hop_index)
            edge = None if lost.edge is None else self._peer_at(lost.edge)
            if peer != self._pool.host.peer_id.multihash:
                retry_after_s = error.retry_after_s if isinstance(error, SessionFault) else None
                self._avoided.add(peer, now + (retry_after_s or AVOID_S))
            if edge is not None and edge != self._pool.host.peer_id.multihash:
                self._avoided.add(edge, now + AVOID_S)
            if error.blame is not Blame.US and error.code not in ("busy", "draining"):
                self._pool.planner.blame(peer, error, edge)
        self._listener.on_waiting("replaying" if self.output else "planning", error)
        if not self._sampling:
            self._route_over.set()

    def _peer_at(self, index: int) -> bytes:
        route = self.route
        assert route is not None
        return route.hops[index].peer if 0 <= index < len(route) else self._pool.host.peer_id.multihash

    # --- the token loop ---

    def _on_ready(self, ready: RouteReady) -> None:
        self._flowing = ready.epoch
        self._chunk_tokens = min(PREFILL_TOKENS, ready.window_tokens)
        self._next_position = 0
        self._embedding = False
        self._embed_more()

    def _embed_more(self) -> None:
        """Embed the next chunk of what the route has not seen, while its credits have room."""
        if self._embedding or self._flowing is None or self._sampling:
            return
        start = self._next_position
        if start >= len(self.tokens) or (start > 0 and self._driver.room == 0):
            return
        chunk = tuple(self.tokens[start : start + self._chunk_tokens])
        priority = JobPriority.PREFILL if len(chunk) > 1 else JobPriority.DECODE
        self._embedding = True
        epoch = self._flowing
        job = EmbedJob(self._model.key, chunk, start, priority)
        self._pool.device.submit((job,), lambda result: self._embedded(epoch, result))

    def _embedded(self, epoch: Epoch, result: JobResult) -> None:
        if self._ended or epoch != self._flowing:
            return
        self._embedding = False
        if result.error is not None or result.hidden is None:
            self._end("error", result.error)
            return
        assert isinstance(result.job, EmbedJob)
        self._submit(result.hidden, result.job.position, len(result.job.tokens))
        self._embed_more()

    def _submit(self, hidden: Part, position: int, count: int) -> None:
        self._next_position = position + count
        is_last = self._next_position == len(self.tokens)
        self._driver.submit(hidden, position, count, "last" if is_last else "none", self._pool.clock.now())
        self._execute()

    def _on_output(self, output: Output) -> None:
        self._stalled_at = None
        self._barren_routes = 0
        if output.hidden is None:
            self._embed_more()
            return
        position = output.position + output.tokens
        if position != len(self.tokens) or self._sampling:
            return
        self._sampling = True
        request = self._request
        needs_history = request.params.has_penalties
        job = SampleJob(
            self._model.key,
            output.hidden,
            request.params,
            position,
            tuple(self.tokens) if needs_history else (),
            len(request.prompt),
            embed_next=True,
            want_logits=request.want_logits,
        )
        self._pool.device.submit((job,), self._sampled)

    def _sampled(self, result: JobResult) -> None:
        self._sampling = False
        if self._ended:
            return
        if result.error is not None or result.token is None:
            self._end("error", result.error)
            return
        now = self._pool.clock.now()
        token, times = result.token, self.times
        times.first_token = times.first_token or now
        times.last_token = now
        self.tokens.append(token)
        goes_on = self._listener.on_token(token, result.logits)
        if self.is_over:  # the listener may have cancelled
            return
        if not goes_on or (token in self._request.stop_tokens and not self._request.ignore_eos):
            self._end("stop", None)
        elif len(self.output) >= self._request.max_new_tokens:
            self._end("length", None)
        elif self._flowing is None:
            self._route_over.set()
        elif self._moving:
            self._flowing = None
            self._route_over.set()
        elif result.hidden is not None:
            self._submit(result.hidden, len(self.tokens) - 1, 1)

    # --- the machine ---

    def lane_message(self, message: Message, origin: bytes) -> None:
        """From a control or data lane."""
        if not self._ended:
            self._driver.receive(message, origin, self._pool.clock.now())
            self._execute()

    def data_message(self, message: Message, origin: bytes, verified: bool) -> None:
        """A result, from the last hop's own stream."""
        if verified:
            self.lane_message(message, origin)

    def lane_lost(self, epoch: Epoch, hop_index: int, error: PeerdError) -> None:
        """A lane ended unasked."""
        if not self._ended:
            self._driver.hop_lost(epoch, hop_index, error, self._pool.clock.now())
            self._execute()

    def _execute(self) -> None:
        if self._executing:
            return
        self._executing = True
        try:
            while True:
                commands, events = self._driver.poll_commands(), self._driver.poll_events()
                if not commands and not events:
                    break
                for command in commands:
                    self._do(command)
                for event in events:
                    self._hear(event)
        finally:
            self._executing = False
        self._arm()

    def _do(self, command: object) -> None:
        if isinstance(command, SendData):
            self._lanes.send_data(command.epoch, command.message)
        elif isinstance(command, SendControl):
            self._lanes.send_control(command.epoch, command.hop_index, command.message)
        elif isinstance(command, OpenHop):
            self._lanes.open(command)
        elif isinstance(command, CloseHops):
            self._lanes.close(command)

    def _hear(self, event: object) -> None:
        if self._ended:
            return
        if isinstance(event, Output):
            self._on_output(event)
        elif isinstance(event, RouteReady):
            self._on_ready(event)
        elif isinstance(event, RouteLost):
            self._on_lost(event)
        elif isinstance(event, Moving):
            self._on_moving(event)
        elif isinstance(event, Ended):
            self._end("error", event.error)

    def _on_moving(self, moving: Moving) -> None:
        self._avoided.add(self._peer_at(moving.hop_index), self._pool.clock.now() + moving.deadline_s)
        try:
            avoid = self._avoided.now(self._pool.clock.now())
            self._pool.planner.plan(self._model.model, self._model.compute_class, avoid)
        except PeerdError:
            return  # nowhere to go yet: the hop serves until its deadline, and the loss is dealt with then
        self._moving = True

    def _arm(self) -> None:
        due = self._driver.next_timeout()
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due is not None and not self._ended:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - self._pool.clock.now()), self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._driver.on_timeout(self._pool.clock.now())
        self._execute()

    def _end(self, reason: str, error: PeerdError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._driver.close(self._pool.clock.now())
        self._executing = False
        for command in self._driver.poll_commands():
            self._do(command)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None and asyncio.current_task() is not self._task:
            self._task.cancel()  # it may be waiting for the swarm to change
        if reason in ("stop", "length") and self.route is not None:
            self._pool.planner.praise([hop.peer for hop in self.route.hops])
        self._pool.directory.remove(self.session)
        self._pool.ended(self)
        self._route_over.set()
        self._listener.on_end(reason, error)
