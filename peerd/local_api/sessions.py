"""``/api/v0/sessions``: sessions that are fed hidden states (docs/training.md, section 5).

Owns the form of requests and answers. What a session is, is `peerd.hidden_sessions`'; closing the connection in a step cancels the step,
and the session stays until it expires.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from overlay.rpc.types import Part
from peerd.client.tensor_body import Tensor
from peerd.driving import RouteWish
from peerd.generation import Stopping
from peerd.hidden_sessions import HiddenSession, Rows
from peerd.local_api.completions import json_body, json_response
from peerd.local_api.errors import InvalidRequest
from peerd.local_api.limits import DEFAULT_WAIT_S, MODEL_NAME_CHARS_MAX, WAIT_S_MAX
from peerd.local_api.node_view import BlockModel, NodeView
from peerd.local_api.tensor_bodies import CONTENT_TYPE, TensorBodies, answer_tensors, checked, open_blocks, tensor_of
from peerd.local_api.tensor_requests import SESSION_SETTINGS, parse_session, parse_step, read_prompts, read_states
from routing.types import Span


class SessionPaths:
    """The handlers of all paths of sessions."""

    def __init__(self, node: NodeView, bodies: TensorBodies) -> None:
        self._node = node
        self._bodies = bodies
        self._stopping = False

    def routes(self) -> list[web.RouteDef]:
        """Every path and method."""
        return [
            web.post("/api/v0/sessions", self._open),
            web.post("/api/v0/sessions/{id}/step", self._step),
            web.delete("/api/v0/sessions/{id}", self._close),
        ]

    def cancel_all(self) -> None:
        """End every session: steps under way hear `Stopping`."""
        self._stopping = True
        self._node.hidden_sessions.close_all(_stopping())

    async def _open(self, http: web.Request) -> web.StreamResponse:
        if http.content_type != CONTENT_TYPE:
            return await self._opened(await json_body(http), None)
        async with self._bodies.receive(http) as body:
            return await self._opened(*parse_session(body))

    async def _opened(self, body: dict[str, Any], prompts: Tensor | None) -> web.StreamResponse:
        for field in body:
            if field not in SESSION_SETTINGS:
                raise InvalidRequest(
                    f"There is no {field[:80]!r} here; there is: {', '.join(SESSION_SETTINGS)}.", field[:80]
                )
        name = body.get("model")
        if name is not None and (not isinstance(name, str) or len(name) > MODEL_NAME_CHARS_MAX):
            raise InvalidRequest(f"model must be a string of at most {MODEL_NAME_CHARS_MAX} characters.", "model")
        wait_s = body.get("timeout", DEFAULT_WAIT_S)
        if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= WAIT_S_MAX:
            raise InvalidRequest(f"timeout must be a number of seconds from 0 to {WAIT_S_MAX:g}.", "timeout")
        model = await open_blocks(self._node, name or None, wait_s)
        span, max_tokens = _span(body, model), _max_tokens(body, model)
        own = None
        if prompts is not None:
            own = await checked(len(prompts.data), read_prompts, prompts, model, span, max_tokens)
        if self._stopping:
            raise _stopping()
        part = None if len(span) == model.blocks else span
        session = self._node.open_session(RouteWish(model.driver, max_tokens, float(wait_s), part, own))
        return json_response(_document(session, model, span), 201)

    async def _step(self, http: web.Request) -> web.StreamResponse:
        session = self._node.hidden_sessions.get(http.match_info["id"])
        async with self._bodies.receive(http) as body:
            request = parse_step(body)
            hidden = await checked(len(body), read_states, request, session.model)
            want: Rows = "last" if request.want == "last" else "all"
            # The journal outlives the body, of which it would keep everything.
            own = Part("hidden", hidden.dtype, hidden.shape, bytes(hidden.data))
        rows = await session.step(own, request.position, want)
        return await answer_tensors(http, {"hidden": await asyncio.to_thread(_joined, rows)}, {})

    async def _close(self, http: web.Request) -> web.StreamResponse:
        self._node.hidden_sessions.get(http.match_info["id"]).close()
        return web.Response(status=204)


def _span(body: dict[str, Any], model: BlockModel) -> Span:
    start, end = body.get("start", 0), body.get("end", model.blocks)
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= model.blocks:
        raise InvalidRequest(
            f"{str(start)[:20]}:{str(end)[:20]} is no span of {model.name}, which has blocks 0:{model.blocks}.", "start"
        )
    return Span(start, end)


def _max_tokens(body: dict[str, Any], model: BlockModel) -> int:
    most = model.driver.max_positions
    wanted = body.get("max_tokens")
    if type(wanted) is not int or not 1 <= wanted <= most:
        raise InvalidRequest(
            f"max_tokens must be a whole number from 1 to {most}, the context of {model.name}.", "max_tokens"
        )
    return wanted


def _document(session: HiddenSession, model: BlockModel, span: Span) -> dict[str, Any]:
    driver = model.driver
    return {
        "id": session.session.hex(),
        "model": model.name,
        "start": span.start,
        "end": span.end,
        "max_tokens": session.max_tokens,
        "width": driver.width,
        "dtype": driver.compute_class.dtype,
    }


def _joined(rows: list[Part]) -> Tensor:
    """(1, rows, d_model) of all parts."""
    count, width = sum(part.shape[0] for part in rows), rows[0].shape[1]
    data = rows[0].data if len(rows) == 1 else b"".join(part.data for part in rows)
    return tensor_of(Part("hidden", rows[0].dtype, (1, count, width), data))


def _stopping() -> Stopping:
    return Stopping("The daemon is stopping; ask another one, or again when it is back.")
