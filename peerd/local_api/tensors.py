"""``/api/v0/forward`` and ``/api/v0/backward``: tensors in, tensors out, a model's blocks between (docs/training.md, section 5).

Owns the shelf of tapes. What a request may say is `tensor_requests`'s; which servers compute it,
`peerd.calls`'. Closing the connection cancels the handler, which cancels the calls.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from peerd.calls.caller import Gradients
from peerd.generation import Stopping
from peerd.local_api.completions import json_response
from peerd.local_api.errors import TapeGone, TooManyRequests
from peerd.local_api.limits import (
    TAPE_ID_BYTES,
    TENSOR_REQUESTS_MAX,
)
from peerd.local_api.node_view import NodeView
from peerd.local_api.tape_shelf import KeptTape, TapeShelf
from peerd.local_api.tensor_bodies import TensorBodies, answer_tensors, checked, open_blocks, tensor_of
from peerd.local_api.tensor_requests import TensorRequest, parse_backward, parse_forward, read_batch, read_grad

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Tensors:
    """The handlers of both paths, the requests under way, and the tapes kept between them."""

    def __init__(self, node: NodeView, bodies: TensorBodies) -> None:
        self._node = node
        self._bodies = bodies
        self._shelf = TapeShelf()
        self._expiry: asyncio.TimerHandle | None = None
        self._running: dict[int, asyncio.Task[object]] = {}
        self._stopping = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """Paths and methods."""
        return [
            web.post("/api/v0/forward", self.forward),
            web.post("/api/v0/backward", self.backward),
            web.get("/api/v0/models/{name}", self.model),
            web.post("/api/v0/models/{name}/tensors", self.outside),
        ]

    async def forward(self, http: web.Request) -> web.StreamResponse:
        return await self._handle(http, self._forward)

    async def backward(self, http: web.Request) -> web.StreamResponse:
        return await self._handle(http, self._backward)

    async def model(self, http: web.Request) -> web.StreamResponse:
        """What a client that runs blocks has to know of their model."""
        model = await self._node.block_model(http.match_info["name"])
        driver = model.driver
        return json_response(
            {
                "id": driver.model.hex(),
                "name": model.name,
                "blocks": model.blocks,
                "width": driver.width,
                "max_positions": driver.max_positions,
                "compute_class": str(driver.compute_class),
                "dtype": driver.compute_class.dtype,
                "config": json.loads(model.config),
            }
        )

    async def outside(self, http: web.Request) -> web.StreamResponse:
        """Embeddings, norm and head."""
        return await answer_tensors(http, await self._node.outside_tensors(http.match_info["name"]), {})

    def cancel_all(self) -> None:
        """End every request under way with `Stopping`, refuse new ones, and let go of all tapes."""
        self._stopping.set()
        self._shelf = TapeShelf()
        if self._expiry is not None:
            self._expiry.cancel()
        for task in tuple(self._running.values()):
            task.cancel()

    async def _handle(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        if self._stopping.is_set():
            raise _stopping()
        if len(self._running) >= TENSOR_REQUESTS_MAX:
            raise TooManyRequests(
                f"{TENSOR_REQUESTS_MAX} tensor requests are under way; try again when some have ended."
            )
        task = asyncio.current_task()
        assert task is not None
        self._running[id(task)] = task
        try:
            return await handler(http)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            task.uncancel()
            raise _stopping() from None
        finally:
            del self._running[id(task)]

    async def _forward(self, http: web.Request) -> web.StreamResponse:
        async with self._bodies.receive(http) as body:
            request = parse_forward(body)
            model = await open_blocks(self._node, request.model, request.wait_s)
            span, batch = await checked(len(body), read_batch, request, model)
            hidden, tape = await self._node.calls.forward(
                model.driver, span, batch, keep_tape=request.tape is not None, wait_s=request.wait_s
            )
            name = None if tape is None else self._keep(KeptTape(model.driver, span, hidden.shape, tape))
        return await answer_tensors(http, {"hidden": tensor_of(hidden)}, {} if name is None else {"tape": name})

    async def _backward(self, http: web.Request) -> web.StreamResponse:
        async with self._bodies.receive(http) as body:
            request = parse_backward(body)
            if request.tape is not None:
                gradients = await self._through_tape(request.tape, request, len(body))
            else:
                gradients = await self._gradients(request, await self._all_given(request, len(body)), len(body))
        answer = {"hidden": tensor_of(gradients.hidden)}
        if gradients.prompts is not None:
            answer["prompts"] = tensor_of(gradients.prompts)
        return await answer_tensors(http, answer, {})

    async def _through_tape(self, name: str, request: TensorRequest, size_bytes: int) -> Gradients:
        try:
            with self._shelf.borrow(name, asyncio.get_running_loop().time()) as kept:
                if kept is None:
                    raise TapeGone("What forward kept is gone by now; send hidden and the rest along with grad.")
                return await self._gradients(request, kept, size_bytes)
        finally:
            self._watch_shelf()  # whose timer may have found nothing but tapes in use

    async def _gradients(self, request: TensorRequest, kept: KeptTape, size_bytes: int) -> Gradients:
        grad = await checked(size_bytes, read_grad, request, kept.model, kept.shape)
        return await self._node.calls.backward(kept.model, kept.span, kept.tape, grad, wait_s=request.wait_s)

    async def _all_given(self, request: TensorRequest, size_bytes: int) -> KeptTape:
        """A tape of what came along with the gradient."""
        model = await open_blocks(self._node, request.model, request.wait_s)
        span, batch = await checked(size_bytes, read_batch, request, model)
        return KeptTape(model.driver, span, batch.hidden.shape, self._node.calls.tape_of(span, batch))

    def _keep(self, kept: KeptTape) -> str | None:
        """A name for a tape; None where it is too large to be kept."""
        loop = asyncio.get_running_loop()
        name = self._node.randomness.token(TAPE_ID_BYTES).hex()
        if not self._shelf.put(name, kept, loop.time()):
            return None
        self._watch_shelf()
        return name

    def _watch_shelf(self) -> None:
        if self._expiry is None and not self._stopping.is_set():
            self._expire()

    def _expire(self) -> None:
        """Drop what is too old, and come back when the next may be."""
        loop = asyncio.get_running_loop()
        self._shelf.expire(loop.time())
        due = self._shelf.next_timeout()
        self._expiry = None if due is None else loop.call_at(due, self._expire)


def _stopping() -> Stopping:
    return Stopping("The daemon is stopping; ask another one, or again when it is back.")
