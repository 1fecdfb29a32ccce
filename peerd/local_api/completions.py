"""``/v1/completions`` and ``/v1/chat/completions``: a request's body to a `Generation`, its events to JSON or a stream.

Owns when a stream begins: with the first text or notice, so that whatever fails at once has its own HTTP status. Closing the connection
cancels the handler, which leaves the `Generation`, which frees every hop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from overlay.errors import PeerdError
from peerd.adapters.adapter import SoftPrompt
from peerd.generation import (
    QUIET_S,
    Delta,
    Done,
    Event,
    Generation,
    Quiet,
    Stopping,
    TextModel,
    Waiting,
    encode_prompt,
    with_adapter,
)
from peerd.local_api import replies
from peerd.local_api.errors import MalformedJson, RequestTooLarge, TooManyRequests
from peerd.local_api.limits import BODY_BYTES_MAX, GENERATIONS_MAX, OPEN_RETRY_S
from peerd.local_api.node_view import NodeView
from peerd.local_api.parameters import SEED_BITS, CompletionRequest, parse_completion
from peerd.metrics import Metrics

_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


def json_response(document: dict[str, Any], status: int = 200) -> web.Response:
    """A JSON answer, text kept readable."""
    text = json.dumps(document, ensure_ascii=False)
    return web.Response(text=text, status=status, content_type="application/json")


class EventStream:
    """A streamed answer whose head is only sent with its first piece: until then an error can have a status of its own."""

    def __init__(self, http: web.Request) -> None:
        self._http = http
        self._response = web.StreamResponse(headers=_STREAM_HEADERS)
        self._response.enable_chunked_encoding()

    @property
    def begun(self) -> bool:
        return self._response.prepared

    async def send(self, piece: bytes) -> None:
        """Send a piece; waits while the reader is slow. Raises ConnectionError when the reader is gone."""
        if not self._response.prepared:
            await self._response.prepare(self._http)
        if piece:
            await self._response.write(piece)

    async def finish(self) -> web.StreamResponse:
        """End the answer in good order; a reader that left after the last event has what it wants."""
        with contextlib.suppress(ConnectionError):
            await self._response.write_eof()
        return self._response


class Completions:
    """The handlers of both paths, and the generations under way."""

    def __init__(self, node: NodeView) -> None:
        self._node = node
        self._running: dict[int, Generation] = {}
        self._count = 0
        self._stopping = False

    async def plain(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, is_chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, is_chat=True)

    def cancel_all(self) -> None:
        """End every answer under way with `Stopping`, and refuse new ones."""
        self._stopping = True
        for generation in tuple(self._running.values()):
            generation.stop()

    async def _handle(self, http: web.Request, *, is_chat: bool) -> web.StreamResponse:
        seed = self._node.randomness.below(1 << SEED_BITS)
        request = parse_completion(await json_body(http), is_chat=is_chat, drawn_seed=seed)
        if self._stopping:
            raise Stopping("The daemon is stopping; ask another one, or again when it is back.")
        if self._count >= GENERATIONS_MAX:
            raise TooManyRequests(f"{GENERATIONS_MAX} generations are under way; try again when some have ended.")
        self._count += 1
        self._node.metrics.generations.inc()
        try:
            return await self._answer(http, request)
        finally:
            self._count -= 1
            self._node.metrics.generations.dec()

    async def _answer(self, http: web.Request, request: CompletionRequest) -> web.StreamResponse:
        stream = EventStream(http) if request.stream else None
        started = asyncio.get_running_loop().time()
        try:
            model, soft = await self._adapted(await self._opened(request, stream), request.generation.adapter)
            now_s = self._node.wall_clock.now_s()
            prompt = await asyncio.to_thread(encode_prompt, model, request.generation, now_s)
            async with self._generation(model, request, prompt, soft) as generation:
                writer = replies.CompletionWriter(request, generation.session.hex(), int(now_s), model.name)
                seen = _Seen(self._node.metrics, model.name, started)
                if stream is None:
                    return await self._whole(writer, generation, seen)
                await self._streamed(writer, generation, seen, stream)
        except PeerdError as error:
            if stream is None or not stream.begun:
                raise
            await stream.send(replies.failure(error))
        assert stream is not None
        return await stream.finish()

    async def _adapted(self, model: TextModel, name: str | None) -> tuple[TextModel, SoftPrompt | None]:
        """The model with the adapter of that name in front. Raises UnknownAdapter, BadAdapter, WrongAdapter."""
        if name is None:
            return model, None
        adapter = await asyncio.to_thread(self._node.adapters.load, name)
        return await asyncio.to_thread(with_adapter, model, adapter)

    async def _opened(self, request: CompletionRequest, stream: EventStream | None) -> TextModel:
        """The model, ready to be driven.

        Waits as long as the request allows where waiting can help (the node still joins, or loads); a stream shows it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.generation.wait_s
        while True:
            outcome = await self._open_once(request.model, stream)
            if isinstance(outcome, TextModel):
                return outcome
            if not outcome.retryable or self._stopping or loop.time() >= deadline:
                raise outcome
            if stream is not None:
                await stream.send(replies.comment(Waiting("waiting", str(outcome))))
            await asyncio.sleep(OPEN_RETRY_S)

    async def _open_once(self, name: str | None, stream: EventStream | None) -> TextModel | PeerdError:
        """One try; a stream gets signs of life while the model's small parts are fetched."""
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(self._open_outcome(name), name="open model")
            while not (await asyncio.wait((opening,), timeout=QUIET_S))[0]:
                if stream is not None:
                    await stream.send(replies.KEEP_ALIVE)
        return opening.result()

    async def _open_outcome(self, name: str | None) -> TextModel | PeerdError:
        # As a value, since a task group would wrap the error in a group.
        try:
            return await self._node.open_model(name)
        except PeerdError as error:
            return error

    @asynccontextmanager
    async def _generation(
        self, model: TextModel, request: CompletionRequest, prompt: tuple[int, ...], soft: SoftPrompt | None
    ) -> AsyncIterator[Generation]:
        async with Generation(model, request.generation, prompt, soft) as generation:
            self._running[id(generation)] = generation
            try:
                yield generation
            finally:
                del self._running[id(generation)]

    async def _whole(self, writer: replies.CompletionWriter, generation: Generation, seen: _Seen) -> web.Response:
        text: list[str] = []
        token_ids: list[int] = []
        document: dict[str, Any] = {}
        async for event in generation:
            seen.note(event)
            if isinstance(event, Delta):
                text.append(event.text)
                token_ids += event.token_ids
            elif isinstance(event, Done):
                document = writer.whole("".join(text), token_ids, event)
        return json_response(document)

    async def _streamed(
        self, writer: replies.CompletionWriter, generation: Generation, seen: _Seen, stream: EventStream
    ) -> None:
        opening = writer.first()
        async for event in generation:
            seen.note(event)
            await stream.send(opening + _piece(writer, event))
            opening = b""


def _piece(writer: replies.CompletionWriter, event: Event) -> bytes:
    if isinstance(event, Delta):
        return writer.delta(event)
    if isinstance(event, Waiting):
        return replies.comment(event)
    if isinstance(event, Quiet):
        return replies.KEEP_ALIVE
    return writer.done(event)


class _Seen:
    """Turns the events of one generation into the node's figures."""

    def __init__(self, metrics: Metrics, model: str, started: float) -> None:
        self._metrics = metrics
        self._model = model
        self._started = started
        self._began = False

    def note(self, event: Event) -> None:
        metrics, model = self._metrics, self._model
        if isinstance(event, Delta) and not self._began:
            self._began = True
            metrics.first_token_s.observe(asyncio.get_running_loop().time() - self._started)
        elif isinstance(event, Done):
            metrics.prompt_tokens.labels(model).inc(event.prompt_tokens)
            metrics.generated_tokens.labels(model).inc(event.completion_tokens)
            metrics.replays.labels(model).inc(event.replays)


async def json_body(http: web.Request) -> dict[str, Any]:
    """The body as a JSON object. Raises MalformedJson, RequestTooLarge."""
    if (http.content_length or 0) > BODY_BYTES_MAX:
        raise RequestTooLarge(f"The request is over {BODY_BYTES_MAX >> 20} MiB; send less.")
    raw = await http.read()
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise MalformedJson(
            f'The request\'s body is not JSON{where}; send an object like {{"prompt": "Hello"}}.'
        ) from error
    if b"\\ud" in raw.lower() and not _is_text(document):
        raise MalformedJson("The request's text has half of a surrogate pair, which is no character.")
    if not isinstance(document, dict):
        raise MalformedJson("The request's body must be a JSON object.")
    return document


def _is_text(document: object) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
