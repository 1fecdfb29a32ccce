"""The HTTP server on the Unix socket: routes, the check of who asks, and errors as JSON.

A shell over aiohttp. What completions do is `peerd.local_api.completions`'s; what the node is, `node_view`'s. This is a supervision
point: whatever goes wrong in a request ends as a coded answer and a line in the log, and the daemon lives on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from overlay.errors import PeerdError
from peerd.local_api import replies
from peerd.local_api.adapters import AdapterPaths
from peerd.local_api.completions import Completions, json_response
from peerd.local_api.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
    error_document,
)
from peerd.local_api.jobs import JobPaths
from peerd.local_api.limits import BODY_BYTES_MAX, HEADER_LINE_BYTES_MAX, STOP_GRACE_S
from peerd.local_api.node_view import NodeView
from peerd.local_api.sessions import SessionPaths
from peerd.local_api.socket_file import listening_socket, peer_uid
from peerd.local_api.tensor_bodies import TensorBodies
from peerd.local_api.tensors import Tensors
from peerd.metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(node: NodeView, socket_path: Path, owner_uid: int | None = None) -> AsyncIterator[None]:
    """Answer at ``socket_path`` until the block ends; then answers under way are cancelled and the socket is removed.

    Args:
        owner_uid: whose processes may ask, besides root's; None: those of this process's user.

    Raises:
        SocketPathError, SocketDirectoryError, SocketInUse.
    """
    with listening_socket(socket_path) as listener:
        api = LocalApi(node, os.getuid() if owner_uid is None else owner_uid)
        runner = web.AppRunner(
            api.application(),
            handle_signals=False,
            access_log=None,
            logger=_http_log(),
            handler_cancellation=True,
            shutdown_timeout=STOP_GRACE_S,
            max_line_size=HEADER_LINE_BYTES_MAX,
            max_field_size=HEADER_LINE_BYTES_MAX,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            api.completions.cancel_all()
            api.tensors.cancel_all()
            api.jobs.cancel_all()
            api.sessions.cancel_all()
            await runner.cleanup()


class _OneLine(logging.Filter):
    """Bytes that are no HTTP are the sender's fault: a line in the log, not a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
            record.msg, record.args = "refused bytes on the local socket that are no HTTP", ()
            record.exc_info = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


def _http_log() -> logging.Logger:
    logger = log.getChild("http")
    if not logger.filters:
        logger.addFilter(_OneLine())
    return logger


class LocalApi:
    """The routes. Makes an aiohttp application; owns no socket."""

    def __init__(self, node: NodeView, owner_uid: int) -> None:
        self._node = node
        self._owner_uid = owner_uid
        self._created = int(node.wall_clock.now_s())
        self.completions = Completions(node)
        bodies = TensorBodies()
        self.tensors = Tensors(node, bodies)
        self.sessions = SessionPaths(node, bodies)
        self.jobs = JobPaths(node)
        self.adapters = AdapterPaths(node)

    def application(self) -> web.Application:
        """Every path and method there is."""
        application = web.Application(middlewares=[self._supervised], client_max_size=BODY_BYTES_MAX)
        application.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/v1/completions", self.completions.plain),
                web.post("/v1/chat/completions", self.completions.chat),
                web.get("/api/v0/status", self._status),
                web.get("/api/v0/swarm", self._swarm),
                web.get("/api/v0/metrics", self._metrics),
                web.post("/api/v0/stop", self._stop),
                *self.tensors.routes(),
                *self.jobs.routes(),
                *self.sessions.routes(),
                *self.adapters.routes(),
            ]
        )
        return application

    @web.middleware
    async def _supervised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks who asks, and turns every error into its JSON."""
        try:
            self._check_owner(request)
            response = await handler(request)
        except PeerdError as error:
            response = _refusal(error)
        except web.HTTPException as error:
            response = _refusal(_of_http(error, request))
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client is gone: nobody is left to answer
        except Exception:  # the supervision point of the local API
            log.exception("the local API failed to answer %s %s", request.method, request.path)
            response = _refusal(InternalError("The daemon failed to answer; its log says why."))
        self._count(request, response.status)
        return response

    def _check_owner(self, request: web.Request) -> None:
        connection = None if request.transport is None else request.transport.get_extra_info("socket")
        # asyncio gives a TransportSocket, which has getsockopt; a system that can't name the peer has the file's mode.
        uid = None if connection is None else peer_uid(connection)
        if uid not in (None, 0, self._owner_uid):
            raise Forbidden("This daemon belongs to another user; start your own with `peerd start`.")

    def _count(self, request: web.Request, status: int) -> None:
        resource = request.match_info.route.resource
        path = "other" if resource is None else resource.canonical
        self._node.metrics.requests.labels(path, str(status)).inc()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return json_response(replies.models_document(self._node.swarm(), self._created))

    async def _model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        for entry in replies.models_document(self._node.swarm(), self._created)["data"]:
            if entry["id"] == name:
                return json_response(entry)
        raise NotFound(f"There is no model {name[:80]!r} here; GET /v1/models lists those there are.")

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return json_response(replies.status_document(self._node.status(), os.getpid()))

    async def _swarm(self, request: web.Request) -> web.StreamResponse:
        return json_response(replies.swarm_document(self._node.swarm()))

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._node.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        # Asked in the next turn of the loop, so that this answer is on its way before anything closes.
        asyncio.get_running_loop().call_soon(self._node.request_stop)
        return json_response({"stopping": True, "pid": os.getpid()})


def _refusal(error: PeerdError) -> web.Response:
    response = json_response(error_document(error), error.http_status)
    retry_after_s = getattr(error, "retry_after_s", None)
    if error.http_status == 503 and isinstance(retry_after_s, int | float):
        response.headers["Retry-After"] = str(max(1, round(retry_after_s)))
    return response


def _of_http(error: web.HTTPException, request: web.Request) -> PeerdError:
    """aiohttp's own refusals in our words."""
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"There is nothing at {request.path[:80]}; docs/cli.md lists what there is.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.path[:80]} takes {allowed}, not {request.method[:20]}.")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return RequestTooLarge(f"The request is over {BODY_BYTES_MAX >> 20} MiB; send less.")
    return InvalidRequest(f"The request can't be understood ({error.reason}).")
