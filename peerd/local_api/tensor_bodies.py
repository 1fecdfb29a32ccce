"""Bodies of tensors: how they come in, within bounds, how they are checked, and how tensors are answered.

Shared by every path that takes or gives tensors. Knows no request's meaning.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from aiohttp import web

from overlay.errors import PeerdError
from overlay.rpc.types import Part
from peerd.client.tensor_body import Tensor, encode
from peerd.local_api.errors import BodiesFull, InvalidRequest, RequestTooLarge
from peerd.local_api.limits import (
    BUSY_RETRY_S,
    CHECK_INLINE_BYTES,
    OPEN_RETRY_S,
    TENSOR_BODIES_BYTES_MAX,
    TENSOR_BODY_BYTES_MAX,
)
from peerd.local_api.node_view import BlockModel, NodeView
from peerd.local_api.tensor_requests import DTYPES

CONTENT_TYPE = "application/octet-stream"
WRITE_BYTES = 1 << 20
_SAFETENSORS = {name: code for code, name in DTYPES.items()}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class TensorBodies:
    """The bodies of all tensor requests under way together."""

    def __init__(self) -> None:
        self._bytes = 0

    @asynccontextmanager
    async def receive(self, http: web.Request) -> AsyncIterator[bytearray]:
        """A request's whole body, counted for as long as the block lasts."""
        size = http.content_length
        if size is None:
            raise InvalidRequest("A request with tensors needs a Content-Length.")
        if size > TENSOR_BODY_BYTES_MAX:
            raise RequestTooLarge(
                f"The request has {size >> 20} MiB and may have {TENSOR_BODY_BYTES_MAX >> 20}; send fewer rows at a time."
            )
        if self._bytes + size > TENSOR_BODIES_BYTES_MAX:
            raise BodiesFull(
                f"Tensor requests of {self._bytes >> 20} MiB are under way, of {TENSOR_BODIES_BYTES_MAX >> 20} that there may be; "
                "try again when some have ended.",
                BUSY_RETRY_S,
            )
        self._bytes += size
        try:
            yield await _read(http, size)
        finally:
            self._bytes -= size


async def open_blocks(node: NodeView, name: str | None, wait_s: float) -> BlockModel:
    """The model; waits up to ``wait_s`` where waiting can help (the node still joins, or loads)."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while True:
        try:
            return await node.block_model(name)
        except PeerdError as error:
            if not error.retryable or loop.time() >= deadline:
                raise
        await asyncio.sleep(OPEN_RETRY_S)


async def checked(
    size_bytes: int, work: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
) -> Result:
    """Check a body, off the loop when it is large."""
    if size_bytes <= CHECK_INLINE_BYTES:
        return work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)


async def _read(http: web.Request, size: int) -> bytearray:
    body = bytearray(size)
    filled = 0
    async for piece in http.content.iter_any():
        if filled + len(piece) > size:
            break
        body[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled != size:
        raise InvalidRequest("The request's body is not as long as its Content-Length says.")
    return body


def tensor_of(part: Part) -> Tensor:
    """As safetensors has it, over the same bytes."""
    return Tensor(_SAFETENSORS[part.dtype], part.shape, part.data)


async def answer_tensors(
    http: web.Request, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> web.StreamResponse:
    """A safetensors body, in pieces where it is long."""
    pieces = encode(tensors, metadata)
    size = sum(map(len, pieces))
    if size <= WRITE_BYTES:
        return web.Response(body=b"".join(pieces), content_type=CONTENT_TYPE)
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE, "Content-Length": str(size)})
    await response.prepare(http)
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), WRITE_BYTES):
            await response.write(view[start : start + WRITE_BYTES])
    await response.write_eof()
    return response
