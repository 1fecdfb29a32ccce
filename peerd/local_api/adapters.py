"""``/api/v0/adapters``: what adapters there are, and their removal (docs/training.md, section 5)."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from peerd.adapters.store import AdapterInfo
from peerd.local_api.completions import json_response
from peerd.local_api.node_view import NodeView


class AdapterPaths:
    """The handlers of all paths of adapters. Names never become paths unchecked: the store sees to that."""

    def __init__(self, node: NodeView) -> None:
        self._node = node

    def routes(self) -> list[web.RouteDef]:
        """Every path and method."""
        return [
            web.get("/api/v0/adapters", self._list),
            web.get("/api/v0/adapters/{name}", self._one),
            web.delete("/api/v0/adapters/{name}", self._remove),
        ]

    async def _list(self, http: web.Request) -> web.StreamResponse:
        found = await asyncio.to_thread(self._node.adapters.list)
        return json_response({"adapters": [document(info) for info in found]})

    async def _one(self, http: web.Request) -> web.StreamResponse:
        return json_response(document(await asyncio.to_thread(self._node.adapters.info, http.match_info["name"])))

    async def _remove(self, http: web.Request) -> web.StreamResponse:
        name = http.match_info["name"]
        await asyncio.to_thread(self._node.adapters.remove, name)
        return json_response({"removed": name})


def document(info: AdapterInfo) -> dict[str, Any]:
    """As JSON has it; of one that can't be used, ``problem`` says why and what isn't known is null."""
    return {
        "name": info.name,
        "kind": info.kind or None,
        "model": info.model_name or None,
        "model_id": info.model_id or None,
        "length": info.length or None,
        "size_bytes": info.size_bytes,
        "problem": info.problem or None,
    }
