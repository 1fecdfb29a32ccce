"""The life of a session's routes: plan, open, drive, lose, plan again.

Owns one driver machine with its lanes and its timer, whom to avoid and whom to blame, and how long to wait for servers. What flows
through a route, and what has to be sent again on the next one, is its user's (`RouteUser`): the token loop of `peerd.decoding`, and
hidden states of `peerd.hidden_sessions`. What a session may say is `blocks.protocol.driver`'s; which servers there are, the planner's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

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
from blocks.protocol.device import Device
from blocks.protocol.driver import Driver, DriverSettings
from blocks.protocol.messages import Epoch, Want
from blocks.protocol.session_errors import SessionFault
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.ports import Clock, Randomness
from overlay.rpc.types import Message, Part
from peerd.lanes import Lanes
from routing.types import ComputeClass, ModelId, Route, Span

log = logging.getLogger(__name__)

AVOID_S = 20.0
RETRY_S = 0.25
RETRY_MAX_S = 2.0
ROUTES_MAX = 1000
SESSION_BYTES = 16


class Planner(Protocol):
    """Who knows the swarm."""

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        """A route now, through ``span`` (None: every block).

        Raises a retryable PeerdError while blocks are joining, another when nobody serves or loads them.
        """

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        """``peer`` (or its link to ``edge``) failed us."""

    def praise(self, peers: Sequence[bytes]) -> None:
        """A session ended well with these: what they did before is forgiven."""

    async def wait_changed(self, timeout_s: float) -> None:
        """Until the swarm looks different, or ``timeout_s``."""


@dataclass(frozen=True, slots=True)
class DriverModel:
    """What a driver has to know of a model; ``key`` is the device's name for its head."""

    key: str
    model: ModelId
    compute_class: ComputeClass
    width: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every session of a node needs of it."""

    host: Host
    service: SpanService
    directory: SessionDirectory
    device: Device
    planner: Planner
    clock: Clock
    randomness: Randomness
    incarnation: int
    tasks: asyncio.TaskGroup


@dataclass(frozen=True, slots=True)
class RouteWish:
    """What the routes of a session have to carry.

    Attributes:
        span: the blocks to go through; None: all.
        prompts: (blocks of the span, length, d_model) in the compute dtype, added before each block at positions below length.
        wait_s: bounds each time that the session has to wait for servers.
    """

    model: DriverModel
    max_tokens: int
    wait_s: float
    span: Span | None = None
    prompts: Part | None = None


class RouteUser(Protocol):
    """What flows through the routes; called synchronously on the loop's thread."""

    def route_ready(self, ready: RouteReady) -> None:
        """A route is open and knows nothing yet: everything is to be sent, from position 0."""

    def route_output(self, output: Output) -> None:
        """The answer to a window of the present route."""

    def route_lost(self, error: PeerdError) -> None:
        """Nothing flows any more. Say `SessionRoute.leave` when the next one may be planned."""

    def route_waits(self, error: PeerdError) -> None:
        """There is no route for now."""

    def route_failed(self, error: PeerdError | None) -> None:
        """There is none in time, or there can't be any."""


@dataclass(slots=True)
class _Avoided:
    until: dict[bytes, float] = field(default_factory=dict)

    def add(self, peer: bytes, until: float) -> None:
        self.until[peer] = until

    def now(self, now: float) -> tuple[bytes, ...]:
        return tuple(peer for peer, until in self.until.items() if until > now)


class SessionRoute:
    """See the module. `begin` it once; `end` it once."""

    def __init__(self, around: Surroundings, wish: RouteWish, user: RouteUser) -> None:
        self._around = around
        self._wish = wish
        self._user = user
        self.session = around.randomness.token(SESSION_BYTES)
        self.route: Route | None = None
        self.routes = 0
        self.flowing: Epoch | None = None
        """The epoch of the route that is open."""
        self.is_moving = False
        """A hop leaves, and there is another way: say `leave` when nothing is lost by it."""
        self.over = False
        self.is_dead = False
        """No further route can be had, whoever asks."""
        self._avoided = _Avoided()
        self._route_over = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._last_error: PeerdError | None = None
        self._stalled_at: float | None = around.clock.now()
        """Since when nothing has come out: only so long does ``wait_s`` count."""
        self._barren_routes = 0
        self._executing = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._lanes = Lanes(around.host, around.service, around.tasks, self)
        self._driver = Driver(self._settings())

    def _settings(self) -> DriverSettings:
        around, wish = self._around, self._wish
        return DriverSettings(
            self.session,
            around.incarnation,
            around.host.peer_id.multihash,
            tuple(str(address.without_peer()) for address in around.host.addresses),
            wish.model.model,
            wish.model.compute_class,
            wish.max_tokens,
            wish.model.width,
            wish.model.compute_class.dtype,
            prompts=wish.prompts,
        )

    # --- for the user ---

    @property
    def replays(self) -> int:
        """How often the session moved to another route."""
        return max(0, self.routes - 1)

    @property
    def room(self) -> int:
        """How many windows of the granted size could be sent at once."""
        return self._driver.room

    def begin(self, name: str) -> None:
        """Look for the first route; ``name`` is the task's."""
        self._around.directory.add(self.session, self)
        self._task = self._around.tasks.create_task(self._run(), name=f"{name} {self.session.hex()[:8]}")

    def submit(self, hidden: Part, position: int, count: int, want: Want) -> int:
        """Send a window over the route that is open; returns its turn. The route may be lost before this returns."""
        turn = self._driver.submit(hidden, position, count, want, self._around.clock.now())
        self._execute()
        return turn

    def leave(self) -> None:
        """Done with this route: plan the next."""
        self.flowing = None
        self._route_over.set()

    def rest(self) -> None:
        """Plan no further route until `want` is said: nobody waits for one."""
        self._wanted.clear()

    def want(self) -> None:
        """Somebody waits for a route from now on."""
        if not self._wanted.is_set():
            self._stalled_at = self._around.clock.now()
            self._wanted.set()

    def praise(self) -> None:
        """It went well with this route."""
        if self.route is not None:
            self._around.planner.praise([hop.peer for hop in self.route.hops])

    def end(self) -> None:
        """Every hop hears `close` before this returns to the loop."""
        self.over = True
        self._driver.close(self._around.clock.now())
        self._executing = False
        for command in self._driver.poll_commands():
            self._do(command)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None and asyncio.current_task() is not self._task:
            self._task.cancel()  # it may be waiting for the swarm to change
        self._around.directory.remove(self.session)
        self._route_over.set()

    # --- routes ---

    async def _run(self) -> None:
        """Plan, drive until the route is over, plan again."""
        while not self.over and self.routes < ROUTES_MAX:
            await self._wanted.wait()
            route = await self._plan()
            if route is None or self.over:
                continue
            self._route_over.clear()
            self.is_moving = False
            self.route = route
            self.routes += 1
            self._driver.open(route, self._around.clock.now())
            self._execute()
            await self._route_over.wait()
            await self._pause()
        if not self.over:
            self.is_dead = True
            self._user.route_failed(self._last_error)

    async def _pause(self) -> None:
        """After routes that gave nothing, let the swarm change before the next: no spinning on a refusal."""
        self._barren_routes += 1
        if self.over or self._barren_routes < 2:
            return
        delay_s = min(RETRY_S * 2 ** min(self._barren_routes - 2, 8), RETRY_MAX_S)
        await self._around.planner.wait_changed(delay_s)

    async def _plan(self) -> Route | None:
        """A route; waits where waiting can help, and says so. None when the user was told that there is none."""
        around, wish = self._around, self._wish
        clock = around.clock
        if self._stalled_at is None:
            self._stalled_at = clock.now()
        deadline = self._stalled_at + wish.wait_s
        if self._barren_routes and clock.now() > deadline:
            self._fail(self._last_error)
            return None
        delay_s = RETRY_S
        while not self.over:
            avoid = self._avoided.now(clock.now())
            try:
                return around.planner.plan(wish.model.model, wish.model.compute_class, avoid, wish.span)
            except PeerdError as error:
                left_s = deadline - clock.now()
                can_wait = error.retryable or self.routes > 0 or bool(avoid)
                if not can_wait or left_s <= 0:
                    self._fail(error)
                    return None
                self._user.route_waits(error)
                await around.planner.wait_changed(min(delay_s, left_s))
                if not self._avoided.now(clock.now()) or delay_s >= RETRY_MAX_S:
                    self._avoided.until.clear()
                delay_s = min(2 * delay_s, RETRY_MAX_S)
        return None

    def _fail(self, error: PeerdError | None) -> None:
        """The user may end the session now; if it doesn't, the next `want` tries again."""
        self.rest()
        self._barren_routes = 0
        self._user.route_failed(error)

    def _on_lost(self, lost: RouteLost) -> None:
        route, now = self.route, self._around.clock.now()
        assert route is not None
        error = self._last_error = lost.error
        self.flowing = None
        where = "" if lost.hop_index is None else f" at {self._peer_at(lost.hop_index).hex()[-6:]}"
        log.info("session %s lost its route%s: %s", self.session.hex()[:8], where, error)
        if lost.hop_index is not None:
            peer = self._peer_at(lost.hop_index)
            edge = None if lost.edge is None else self._peer_at(lost.edge)
            own = self._around.host.peer_id.multihash
            if peer != own:
                retry_after_s = error.retry_after_s if isinstance(error, SessionFault) else None
                self._avoided.add(peer, now + (retry_after_s or AVOID_S))
            if edge is not None and edge != own:
                self._avoided.add(edge, now + AVOID_S)
            if error.blame is not Blame.US and error.code not in ("busy", "draining"):
                self._around.planner.blame(peer, error, edge)
        self._user.route_lost(error)

    def _peer_at(self, index: int) -> bytes:
        route = self.route
        assert route is not None
        return route.hops[index].peer if 0 <= index < len(route) else self._around.host.peer_id.multihash

    # --- the machine ---

    def lane_message(self, message: Message, origin: bytes) -> None:
        """From a control or data lane."""
        if not self.over:
            self._driver.receive(message, origin, self._around.clock.now())
            self._execute()

    def data_message(self, message: Message, origin: bytes, verified: bool) -> None:
        """A result, from the last hop's own stream."""
        if verified:
            self.lane_message(message, origin)

    def lane_lost(self, epoch: Epoch, hop_index: int, error: PeerdError) -> None:
        """A lane ended unasked."""
        if not self.over:
            self._driver.hop_lost(epoch, hop_index, error, self._around.clock.now())
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
        if self.over:
            return
        if isinstance(event, Output):
            self._stalled_at = None
            self._barren_routes = 0
            self._user.route_output(event)
        elif isinstance(event, RouteReady):
            self.flowing = event.epoch
            self._user.route_ready(event)
        elif isinstance(event, RouteLost):
            self._on_lost(event)
        elif isinstance(event, Moving):
            self._on_moving(event)
        elif isinstance(event, Ended):
            self.is_dead = True
            self._user.route_failed(event.error)

    def _on_moving(self, moving: Moving) -> None:
        around, wish = self._around, self._wish
        self._avoided.add(self._peer_at(moving.hop_index), around.clock.now() + moving.deadline_s)
        try:
            avoid = self._avoided.now(around.clock.now())
            around.planner.plan(wish.model.model, wish.model.compute_class, avoid, wish.span)
        except PeerdError:
            return  # nowhere to go yet: the hop serves until its deadline, and the loss is dealt with then
        self.is_moving = True

    def _arm(self) -> None:
        due = self._driver.next_timeout()
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due is not None and not self.over:
            delay_s = max(0.0, due - self._around.clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._driver.on_timeout(self._around.clock.now())
        self._execute()
