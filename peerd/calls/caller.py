"""A batch through a run of blocks, wherever they are: micro-batches spread over servers, forward with a tape, backward from it.

Owns retries, who is left alone for a while, and how many calls are under way. Which server is next is `routing.spread`'s, what one call is
`remote`'s, what backward needs `tape`'s. What comes out doesn't depend on which servers computed it. docs/training.md, section 4.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from blocks.call_service import CallService
from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import CALL_ID_BYTES, CallRequest, batch_rows
from blocks.protocol.device import Batch
from blocks.protocol.part_lists import joined, summed
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.ports import Clock, Randomness
from overlay.rpc.types import DTYPE_BYTES, Message, Part
from peerd.calls.quiet import QUIET_S, QuietServers
from peerd.calls.remote import call_remote
from peerd.calls.tape import MicroTape, Section, Tape, section_batch
from peerd.decoding import DriverModel
from peerd.in_order import in_order
from routing.catalog import ModelView
from routing.health import Health
from routing.records import SpanRecord, State
from routing.spread import Spread
from routing.types import ComputeClass, ModelId, Route, Span

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 1024
CALLS_AHEAD_PER_SERVER = 2
CALLS_AHEAD_MIN = 4
AVOID_S = 20.0
BUSY_S = 0.5
LOOK_S = 0.5
ATTEMPTS_MAX = 1000
LEFT_MAX = 64
"""Servers whose loss, or crowd, gives a call new time to wait."""
MODELS_MAX = 64


class CallPlanner(Protocol):
    """Who knows the swarm: `peerd.swarm.Swarm`."""

    @property
    def health(self) -> Health: ...
    def view(self, model: ModelId) -> ModelView: ...
    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route: ...
    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None: ...
    def praise(self, peers: Sequence[bytes]) -> None: ...
    async def wait_changed(self, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of a batch's hidden states, in the compute dtype, and of its prompts, in float32."""

    hidden: Part
    prompts: Part | None = None


@dataclass(slots=True)
class _Job:
    """What all calls of one batch share."""

    model: DriverModel
    whole: Span
    batch: Batch
    wait_s: float
    turns: asyncio.Semaphore
    avoided: dict[bytes, float] = field(default_factory=dict)


class BatchCaller:
    """See the module. Both calls are cancel-safe: streams are reset, and servers drop what hasn't begun."""

    def __init__(
        self, host: Host, service: CallService, planner: CallPlanner, clock: Clock, randomness: Randomness
    ) -> None:
        self._host = host
        self._service = service
        self._planner = planner
        self._clock = clock
        self._randomness = randomness
        self._spreads: dict[ModelId, Spread] = {}
        self._quiet = QuietServers()
        self._self_peer = host.peer_id.multihash
        self.servers_lost = 0
        """Calls that lost their server, so far; a call that loses several counts several times."""

    async def forward(
        self, model: DriverModel, span: Span, batch: Batch, *, keep_tape: bool = False, wait_s: float = 60.0
    ) -> tuple[Part, Tape | None]:
        """``batch`` through blocks ``span``: (rows, tokens, d_model), and what backward needs where it is asked for.

        Args:
            wait_s: how long to wait, each time, for blocks that are loading or servers that are busy.

        Raises:
            CallFault: the batch can't be called. BlocksUnserved, BlocksPending: nobody has some blocks.
        """
        job = self._job(model, span, batch, wait_s)

        def through(start: int, stop: int) -> Callable[[], Coroutine[Any, Any, tuple[Part, tuple[Section, ...]]]]:
            rows = batch_rows(batch, start, stop)
            return lambda: self._through(job, span, rows.hidden, start, stop)

        cuts = self._cuts(batch)
        done = await in_order([through(start, stop) for start, stop in cuts])
        output = joined("hidden", [hidden for hidden, _ in done])
        if not keep_tape:
            return output, None
        micros = [MicroTape(start, stop, sections) for (start, stop), (_, sections) in zip(cuts, done, strict=True)]
        return output, Tape(span, batch, tuple(micros))

    async def backward(
        self, model: DriverModel, span: Span, tape: Tape, grad: Part, *, wait_s: float = 60.0
    ) -> Gradients:
        """The gradient of the output of the forward that made ``tape``, back through it. Raises as `forward`."""
        if span != tape.span or grad.shape != tape.batch.hidden.shape or grad.dtype != tape.batch.hidden.dtype:
            raise CallFault("bad-request", "The gradient isn't one of this forward's output.")
        job = self._job(model, span, tape.batch, wait_s)

        def back(micro: MicroTape) -> Callable[[], Coroutine[Any, Any, Gradients]]:
            own = calls.rows_of(grad, micro.start, micro.stop)
            return lambda: self._back(job, micro.sections, own, micro.start, micro.stop)

        done = await in_order([back(micro) for micro in tape.micros])
        prompts = [gradients.prompts for gradients in done if gradients.prompts is not None]
        return Gradients(
            joined("hidden", [gradients.hidden for gradients in done]), summed("prompts", prompts) if prompts else None
        )

    def tape_of(self, span: Span, batch: Batch) -> Tape:
        """The tape of a forward that wasn't run here: its backward recomputes what lies between servers, where it has to."""
        micros = [
            MicroTape(start, stop, (Section(span, batch_rows(batch, start, stop).hidden, b""),))
            for start, stop in self._cuts(batch)
        ]
        return Tape(span, batch, tuple(micros))

    def _job(self, model: DriverModel, span: Span, batch: Batch, wait_s: float) -> _Job:
        ahead = max(CALLS_AHEAD_MIN, CALLS_AHEAD_PER_SERVER * len(self._planner.view(model.model).servers))
        return _Job(model, span, batch, wait_s, asyncio.Semaphore(ahead))

    @staticmethod
    def _cuts(batch: Batch) -> list[tuple[int, int]]:
        rows, tokens, width = batch.hidden.shape
        row_bytes = tokens * width * DTYPE_BYTES[batch.hidden.dtype]
        return calls.micro_batches(rows, tokens, row_bytes, MICRO_BATCH_TOKENS)

    # --- one micro-batch ---

    async def _through(
        self, job: _Job, span: Span, hidden: Part, start: int, stop: int
    ) -> tuple[Part, tuple[Section, ...]]:
        """Rows [start, stop), whose state before ``span`` is ``hidden``: their state after it, and the sections of the way."""
        sections: list[Section] = []
        block = span.start
        while block < span.end:
            found = await self._call(job, Span(block, span.end), hidden, None, start, stop)
            assert found is not None, "a forward takes as much as a server has"
            answer, section = found
            sections.append(section)
            hidden, block = _part(answer, "hidden"), section.span.end
        return hidden, tuple(sections)

    async def _back(self, job: _Job, sections: Sequence[Section], grad: Part, start: int, stop: int) -> Gradients:
        """Back through ``sections``, last first; where nobody holds all of one any more, through a finer cut of it."""
        prompts: list[Part] = []
        left = list(sections)
        while left:
            section = left.pop()
            found = await self._call(job, section.span, section.hidden, grad, start, stop)
            if found is None:
                left += (await self._through(job, section.span, section.hidden, start, stop))[1]
                continue
            answer, _ = found
            grad = _part(answer, "hidden")
            if job.batch.prompts is not None:
                prompts.insert(0, _part(answer, "prompts"))
        return Gradients(grad, joined("prompts", prompts) if prompts else None)

    # --- one call, until it is answered ---

    async def _call(
        self, job: _Job, span: Span, hidden: Part, grad: Part | None, start: int, stop: int
    ) -> tuple[Message, Section] | None:
        """Have some server run ``span``, or of a forward as much from its start as it has; None: of a backward, nobody has all of it.

        Raises when waiting can't help.
        """
        async with job.turns:  # before a server is chosen: who it is follows from what is known when the call begins
            deadline = self._clock.now() + job.wait_s
            left: list[bytes] = []
            for _ in range(ATTEMPTS_MAX):
                server = await self._server_for(job, span, hidden, backward=grad is not None, deadline=deadline)
                if server is None:
                    return None
                run = Span(span.start, min(span.end, server.span.end))
                batch = section_batch(job.batch, job.whole, run, hidden, start, stop)
                try:
                    answer = await self._ask(job, server, run, batch, grad)
                except PeerdError as error:
                    if self._failed(job, server, error, left):
                        deadline = self._clock.now() + job.wait_s  # what it computed until then was no waiting
                    elif self._clock.now() > deadline:
                        raise
                    continue
                return answer, Section(run, hidden, server.peer)
            raise CallFault("busy", "No server answered the call; try again later.")

    async def _ask(self, job: _Job, server: SpanRecord, run: Span, batch: Batch, grad: Part | None) -> Message:
        model = job.model
        kind = calls.FORWARD if grad is None else calls.BACKWARD
        call = self._randomness.token(CALL_ID_BYTES)
        request = CallRequest(kind, call, model.model, str(model.compute_class), run, batch, grad)
        began = self._clock.now()
        if server.peer == self._self_peer:
            answer = await self._service.call_local(request)
        else:
            answer = await self._ask_remote(server, request)
        work = 1 if grad is None else 3  # backward runs forward again, and costs twice as much itself
        tokens = work * request.rows * request.tokens
        self._spread(model.model).took(server, tokens, len(run), self._clock.now() - began)
        self._planner.praise((server.peer,))
        return answer

    async def _ask_remote(self, server: SpanRecord, request: CallRequest) -> Message:
        def expect(due_s: float) -> None:
            self._quiet.expect(server.peer, request.call, self._clock.now() + due_s)

        expect(QUIET_S)
        try:
            return await call_remote(self._host, server.peer, server.addresses, request, expect)
        finally:
            self._quiet.end(server.peer, request.call)

    def _failed(self, job: _Job, server: SpanRecord, error: PeerdError, left: list[bytes]) -> bool:
        """Leave the server alone for a while, and say whose fault it was; True: the call left it for the first time after a wait there.

        Raises what no other server can help with.
        """
        if error.blame in (Blame.US, Blame.USER) and not error.retryable:
            raise error
        now = self._clock.now()
        after = error.retry_after_s if isinstance(error, CallFault) else None
        if error.code in ("busy", "draining"):
            job.avoided[server.peer] = now + (after or BUSY_S)
            return False
        if error.code in ("conflict", "call-expired"):
            return False  # a new id is all that it takes
        log.info("a call to %s failed: %s", server.peer.hex()[-6:], error)
        job.avoided[server.peer] = now + AVOID_S
        if server.peer == self._self_peer or error.code in ("not-served", "wrong-class"):
            return False  # its record is older than what it does
        is_lost = error.code != "no-turn"  # who has others before us is not lost, and nobody is blamed
        if is_lost and error.blame is not Blame.US:
            self._planner.blame(server.peer, error)
        if server.peer in left or len(left) >= LEFT_MAX:
            return False
        left.append(server.peer)
        self.servers_lost += is_lost
        return True

    async def _server_for(
        self, job: _Job, span: Span, hidden: Part, *, backward: bool, deadline: float
    ) -> SpanRecord | None:
        """Who is next; waits while everybody is busy or loading. Raises what a session would be told."""
        while True:
            usable = self._holders(job, span, whole=backward)
            if usable:
                tokens = (3 if backward else 1) * hidden.shape[0] * hidden.shape[1]
                return self._spread(job.model.model).choose(usable, span.start, span.end, tokens)
            if backward and self._holders(job, span, whole=False) and not self._back_soon(job, span):
                return None
            now = self._clock.now()
            if self._away(job, span) and now < deadline:
                soonest = min(until for until in job.avoided.values() if until > now)
                await self._planner.wait_changed(min(LOOK_S, max(0.01, soonest - now)))
                if all(until > now + BUSY_S for until in job.avoided.values() if until > now):
                    job.avoided.clear()  # nobody else is left: those who failed get another try
                continue
            try:
                self._planner.plan(job.model.model, job.model.compute_class, (), span)
            except PeerdError as error:
                if not error.retryable or now >= deadline:
                    raise
            else:
                if now >= deadline:
                    raise CallFault("busy", "The servers of these blocks don't answer; try again later.")
            await self._planner.wait_changed(LOOK_S)

    def _holders(self, job: _Job, span: Span, *, whole: bool) -> list[SpanRecord]:
        """Online servers of ``span`` (of its first block, unless ``whole``) that are not to be left alone: the best that there are."""
        now = self._clock.now()
        found = [server for server in self._online(job, span, whole=whole) if job.avoided.get(server.peer, now) <= now]
        healthy = [server for server in found if not self._planner.health.is_avoided(server.peer, now)]
        heard = [server for server in healthy if not self._quiet.is_quiet(server.peer, now)]
        return heard or healthy or found

    def _away(self, job: _Job, span: Span) -> bool:
        """Whether some server of the first block is only left alone for now."""
        now = self._clock.now()
        return any(job.avoided.get(server.peer, now) > now for server in self._online(job, span, whole=False))

    def _back_soon(self, job: _Job, span: Span) -> bool:
        """Whether a server of all of ``span`` is only busy: waiting for it costs less than running forward again."""
        soon = self._clock.now() + 2 * BUSY_S
        return any(job.avoided.get(server.peer, soon + 1) <= soon for server in self._online(job, span, whole=True))

    def _online(self, job: _Job, span: Span, *, whole: bool) -> list[SpanRecord]:
        wanted = span if whole else Span(span.start, span.start + 1)
        return [
            server
            for server in self._planner.view(job.model.model).servers
            if server.state is State.ONLINE
            and server.compute_class == job.model.compute_class
            and server.span.covers(wanted)
        ]

    def _spread(self, model: ModelId) -> Spread:
        found = self._spreads.get(model)
        if found is None:
            if len(self._spreads) >= MODELS_MAX:
                del self._spreads[next(iter(self._spreads))]
            found = self._spreads[model] = Spread()
        return found


def _part(answer: Message, name: str) -> Part:
    return next(part for part in answer.parts if part.name == name)
