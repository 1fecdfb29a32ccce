"""``/api/v0/jobs``: a dataset in, a job's progress out (docs/training.md, section 5).

Owns the form of the upload and of the events. What a job is, is `peerd.training.jobs`'. Closing an event stream leaves the job running.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from peerd.generation import QUIET_S
from peerd.local_api.completions import EventStream, json_response
from peerd.local_api.errors import InvalidRequest, MalformedJson, RequestTooLarge, TooManyRequests
from peerd.local_api.node_view import NodeView
from peerd.local_api.replies import KEEP_ALIVE
from peerd.training import limits
from peerd.training.jobs import Job
from peerd.training.settings import parse_settings

log = logging.getLogger(__name__)

UPLOADS_MAX = 2
"""Datasets that are taken in at once, since each is held in memory until it is checked."""
HOW = "send multipart/form-data with the parts settings (JSON) and dataset (JSONL)."


class JobPaths:
    """The handlers of all paths of jobs, and the event streams under way."""

    def __init__(self, node: NodeView) -> None:
        self._node = node
        self._uploads = 0
        self._watchers = 0
        self._stopping = False

    def routes(self) -> list[web.RouteDef]:
        """Every path and method."""
        return [
            web.get("/api/v0/jobs", self._list),
            web.post("/api/v0/jobs", self._create),
            web.get("/api/v0/jobs/{name}", self._one),
            web.get("/api/v0/jobs/{name}/events", self._events),
            web.post("/api/v0/jobs/{name}/cancel", self._cancel),
            web.post("/api/v0/jobs/{name}/resume", self._resume),
        ]

    def cancel_all(self) -> None:
        """End every event stream: the daemon stops, and its jobs go on when it is started again."""
        self._stopping = True
        if self._watchers:
            for job in self._node.jobs.list():
                job.tell()

    async def _list(self, http: web.Request) -> web.StreamResponse:
        return json_response({"jobs": [job.document() for job in self._node.jobs.list()]})

    async def _one(self, http: web.Request) -> web.StreamResponse:
        return json_response(self._job(http).document())

    async def _cancel(self, http: web.Request) -> web.StreamResponse:
        return json_response((await self._node.jobs.cancel(http.match_info["name"])).document())

    async def _resume(self, http: web.Request) -> web.StreamResponse:
        return json_response(self._node.jobs.resume(http.match_info["name"]).document())

    def _job(self, http: web.Request) -> Job:
        return self._node.jobs.get(http.match_info["name"])

    async def _create(self, http: web.Request) -> web.StreamResponse:
        if self._uploads >= UPLOADS_MAX:
            raise TooManyRequests(f"{UPLOADS_MAX} datasets are being taken in; try again in a moment.")
        self._uploads += 1
        try:
            parts = await _parts(http)
            for name in ("settings", "dataset"):
                if name not in parts:
                    raise InvalidRequest(f"The request has no part {name!r}; {HOW}", name)
            settings = parse_settings(_json(parts["settings"]))
            job = await self._node.jobs.submit(settings, parts["dataset"])
        finally:
            self._uploads -= 1
        return json_response(job.document(), 201)

    async def _events(self, http: web.Request) -> web.StreamResponse:
        job = self._job(http)
        if self._watchers >= limits.WATCHERS_MAX:
            raise TooManyRequests(f"{limits.WATCHERS_MAX} programs watch jobs already; end one of them.")
        stream = EventStream(http)
        self._watchers += 1
        try:
            await self._watch(job, stream)
        except ConnectionError:
            log.debug("somebody stopped watching %s", job.name)
        finally:
            self._watchers -= 1
        return await stream.finish() if stream.begun else web.Response()

    async def _watch(self, job: Job, stream: EventStream) -> None:
        """Send what happens, and at least something every `QUIET_S`, up to the end of the job or of the daemon."""
        while not self._stopping:
            news = job.news
            await stream.send(_event("progress", job.document()))
            if job.record.state.is_final:
                await stream.send(_event("end", job.document()))
                return
            while not news.is_set():
                try:
                    async with asyncio.timeout(QUIET_S):
                        await news.wait()
                except TimeoutError:
                    await stream.send(KEEP_ALIVE)


def _event(kind: str, document: dict[str, Any]) -> bytes:
    data = json.dumps({"event": kind, "job": document}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


async def _parts(http: web.Request) -> dict[str, bytes]:
    """The parts of a multipart body by name, each bounded while it comes."""
    if http.content_type != "multipart/form-data":
        raise InvalidRequest(f"A job can't be made from {http.content_type[:60]}; {HOW}")
    found: dict[str, bytes] = {}
    try:
        async for part in await http.multipart():
            if not isinstance(part, BodyPartReader) or part.name not in ("settings", "dataset") or part.name in found:
                raise InvalidRequest(f"The request has a part that doesn't belong there; {HOW}")
            most = limits.DATASET_BYTES_MAX if part.name == "dataset" else limits.SETTINGS_BYTES_MAX
            found[part.name] = await _bounded(part, most)
    except (ValueError, KeyError, HttpProcessingError) as error:  # the last: of the headers of a part
        raise InvalidRequest(f"The multipart body can't be read; {HOW}") from error
    return found


async def _bounded(part: BodyPartReader, most: int) -> bytes:
    data = bytearray()
    while piece := await part.read_chunk():
        data += piece
        if len(data) > most:
            size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
            raise RequestTooLarge(f"The {part.name} is over {size}; send less.")
    return bytes(data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedJson("The settings are not JSON; see docs/training.md.") from error
