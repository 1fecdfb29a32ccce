"""The driver's token loop: one session from prompt to last token, whatever happens to its servers.

Owns the loop of a token (result, sample and embed, window) as synchronous callbacks, and the replay after a loss: the whole token
list on the next route, so that the caller sees a pause and the same text. Routes are `peerd.driving`'s.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from blocks.protocol.commands import Output, RouteReady
from blocks.protocol.device import Device, EmbedBatchJob, EmbedJob, JobPriority, JobResult, SampleJob
from blocks.protocol.messages import Epoch
from blocks.sampling_params import SamplingParams
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.errors import PeerdError
from overlay.host import Host
from overlay.ports import Clock, Randomness
from overlay.rpc.types import DTYPE_BYTES, Part
from peerd.driving import DriverModel, Planner, RouteWish, SessionRoute, Surroundings
from routing.types import Route

__all__ = ["Decode", "DecodeListener", "DecodeRequest", "DecoderPool", "DriverModel", "Planner"]

PREFILL_TOKENS = 512
"""Tokens of one prefill window: long enough to be compute-bound, short enough for others to get in between."""


class DecodeListener(Protocol):
    """Who asked; called synchronously on the loop's thread."""

    def on_token(self, token: int, logits: Part | None) -> bool:
        """A new token; False: stop here."""

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        """Nothing flows for now: ``planning``, ``waiting`` (for blocks or room) or ``replaying``."""

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        """Once: ``stop``, ``length``, ``cancelled`` or ``error``."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What is asked of a session. ``wait_s`` bounds each time that it has to wait for servers.

    Attributes:
        prefix: (length, d_embedding), in front of the prompt; it takes positions, and is no part of history or usage.
        prompts: (blocks, length, d_model) in the compute dtype, added before each block at the first positions.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    want_logits: bool = False
    wait_s: float = 60.0
    prefix: Part | None = None
    prompts: Part | None = None


@dataclass(slots=True)
class DecodeTimes:
    """Loop seconds of the events that people ask about."""

    started: float
    first_token: float | None = None
    last_token: float | None = None


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
        self._given = (host, service, directory, device, planner, clock, randomness, incarnation)
        self._around: Surroundings | None = None
        self._running: dict[bytes, Decode] = {}

    async def __aenter__(self) -> Self:
        tasks = await asyncio.TaskGroup().__aenter__()
        self._around = Surroundings(*self._given, tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for decode in list(self._running.values()):
            decode.cancel()
        await self.around.tasks.__aexit__(None, None, None)

    @property
    def around(self) -> Surroundings:
        """What sessions of this node need of it, while the pool is open."""
        assert self._around is not None, "use `async with DecoderPool(...)`"
        return self._around

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
        self._device, self._clock = pool.around.device, pool.around.clock
        self.model = self._model = model
        self._request = request
        self._listener = listener
        self.tokens: list[int] = list(request.prompt)
        self.times = DecodeTimes(self._clock.now())
        self._ended = False
        self._sampling = False
        self._embedding = False
        self._offset = 0 if request.prefix is None else request.prefix.shape[0]
        """Where the first token stands: behind the prefix."""
        self._embedded_tokens = 0
        self._chunk_tokens = PREFILL_TOKENS
        most = self._offset + len(request.prompt) + request.max_new_tokens
        wish = RouteWish(model, most, request.wait_s, prompts=request.prompts)
        self._route = SessionRoute(pool.around, wish, self)
        self.session = self._route.session

    @property
    def is_over(self) -> bool:
        """Whether `on_end` was called."""
        return self._ended

    @property
    def route(self) -> Route | None:
        return self._route.route

    @property
    def replays(self) -> int:
        """How often the session moved to another route."""
        return self._route.replays

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
        self._route.begin("decode")

    def cancel(self) -> None:
        """Stop now: every hop hears `close` before this returns to the loop. Harmless when over."""
        self._end("cancelled", None)

    # --- RouteUser ---

    def route_ready(self, ready: RouteReady) -> None:
        self._chunk_tokens = min(PREFILL_TOKENS, ready.window_tokens)
        self._embedded_tokens = 0
        self._embedding = False
        self._embed_more()

    def route_lost(self, error: PeerdError) -> None:
        self._listener.on_waiting("replaying" if self.output else "planning", error)
        if not self._sampling:
            self._route.leave()

    def route_waits(self, error: PeerdError) -> None:
        self._listener.on_waiting("waiting", error)

    def route_failed(self, error: PeerdError | None) -> None:
        self._end("error", error)

    def route_output(self, output: Output) -> None:
        if output.hidden is None:
            self._embed_more()
            return
        position = output.position + output.tokens
        if position != self._offset + len(self.tokens) or self._sampling:
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
        self._device.submit((job,), self._sampled)

    # --- the token loop ---

    def _embed_more(self) -> None:
        """Embed the next chunk of what the route has not seen, while its credits have room."""
        epoch = self._route.flowing
        if self._embedding or epoch is None or self._sampling:
            return
        start = self._embedded_tokens
        if start >= len(self.tokens) or (start > 0 and self._route.room == 0):
            return
        chunk = tuple(self.tokens[start : start + self._chunk_tokens])
        self._embedding = True
        prefix = self._request.prefix
        if start == 0 and prefix is not None:
            ids = Part("tokens", "int32", (1, len(chunk)), array("i", chunk).tobytes())
            job: EmbedJob | EmbedBatchJob = EmbedBatchJob(self._model.key, ids, prefix, JobPriority.PREFILL)
        else:
            priority = JobPriority.PREFILL if len(chunk) > 1 else JobPriority.DECODE
            job = EmbedJob(self._model.key, chunk, self._offset + start, priority)
        self._device.submit((job,), lambda result: self._embedded(epoch, result))

    def _embedded(self, epoch: Epoch, result: JobResult) -> None:
        if self._ended or epoch != self._route.flowing:
            return
        self._embedding = False
        if result.error is not None or result.hidden is None:
            self._end("error", result.error)
            return
        if isinstance(result.job, EmbedBatchJob):
            self._submit_with_prefix(result.hidden)
        elif isinstance(result.job, EmbedJob):
            self._submit(result.hidden, result.job.position, len(result.job.tokens))
        self._embed_more()

    def _submit_with_prefix(self, hidden: Part) -> None:
        """The prefix and the first tokens, (1, positions, d_model), in windows that the route takes."""
        _, count, width = hidden.shape
        row_bytes = width * DTYPE_BYTES[hidden.dtype]
        data = memoryview(hidden.data).cast("B")
        for start in range(0, count, self._chunk_tokens):
            end = min(count, start + self._chunk_tokens)
            rows = Part("hidden", hidden.dtype, (end - start, width), data[start * row_bytes : end * row_bytes])
            self._submit(rows, start, end - start)

    def _submit(self, hidden: Part, position: int, count: int) -> None:
        self._embedded_tokens = max(0, position + count - self._offset)
        is_last = self._embedded_tokens == len(self.tokens)
        self._route.submit(hidden, position, count, "last" if is_last else "none")

    def _sampled(self, result: JobResult) -> None:
        self._sampling = False
        if self._ended:
            return
        if result.error is not None or result.token is None:
            self._end("error", result.error)
            return
        now = self._clock.now()
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
        elif self._route.flowing is None or self._route.is_moving:
            self._route.leave()
        elif result.hidden is not None:
            self._submit(result.hidden, self._offset + len(self.tokens) - 1, 1)

    def _end(self, reason: str, error: PeerdError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._route.end()
        if reason in ("stop", "length"):
            self._route.praise()
        self._pool.ended(self)
        self._listener.on_end(reason, error)
