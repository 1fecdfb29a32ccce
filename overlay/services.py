"""The protocols that a host serves, and the task of each stream that a peer opened for one of them.

Owns how many streams of a protocol one peer may have. A handler's exception resets its stream, is logged, and goes no further: this
is one of the two supervision points. Knows nothing of what handlers do, nor of how connections come and go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from overlay import limits
from overlay.connection import Connection
from overlay.errors import PeerdError
from overlay.identity import PeerId
from overlay.stream import Priority, Stream

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]
Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """What becomes of the inbound streams of a protocol."""

    handler: Handler
    max_inbound_per_peer: int
    priority: Priority


class Services:
    """One host's. ``spawn`` starts a task that the host waits for."""

    def __init__(self, spawn: Spawn) -> None:
        self.protocols: frozenset[str] = frozenset()
        """What is served now."""
        self._spawn = spawn
        self._services: dict[str, Service] = {}
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._inbound: dict[tuple[PeerId, str], int] = {}
        self._refuses = False

    def add(self, protocol: str, service: Service) -> None:
        """Serve ``protocol`` from now on, so and not otherwise."""
        self._services[protocol] = service
        self.protocols = frozenset(self._services)

    def remove(self, protocol: str) -> None:
        """Accept no more streams of ``protocol``; running handlers go on."""
        self._services.pop(protocol, None)
        self.protocols = frozenset(self._services)

    def refuse(self) -> None:
        """Nothing begins any more."""
        self._refuses = True

    def cancel(self) -> None:
        """End what runs."""
        for task in list(self._tasks.values()):
            task.cancel()

    def begin(self, connection: Connection, stream: Stream) -> None:
        """A peer opened ``stream``, and both agreed on its protocol: hand it to its handler, or reset it."""
        service = self._services.get(stream.protocol)
        key = (connection.remote_peer, stream.protocol)
        count = self._inbound.get(key, 0)
        if service is None or self._refuses or count >= service.max_inbound_per_peer:
            stream.reset("limit")
            return
        self._inbound[key] = count + 1
        stream.priority = service.priority
        if service.priority in (Priority.DECODE, Priority.BULK):
            connection.session.grant(stream.lane, limits.EXTRA_WINDOW_BYTES)
        name = f"{stream.protocol} from {connection.remote_peer.short}"
        self._tasks[stream] = self._spawn(self._handle(stream, service, key), name)

    async def _handle(self, stream: Stream, service: Service, key: tuple[PeerId, str]) -> None:
        try:
            await service.handler(stream)
            await stream.close()
        except PeerdError as error:
            log.debug("%s from %s ended: %s", stream.protocol, stream.remote_peer.short, error)
            stream.reset(error.code)
        except Exception:
            log.exception("the handler of %s failed; its stream was reset", stream.protocol)
            stream.reset("internal")
        finally:
            self._tasks.pop(stream, None)
            self._inbound[key] -= 1
            if not self._inbound[key]:
                del self._inbound[key]
