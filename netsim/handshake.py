"""How a connection comes about: SYNs through boxes and over lossy paths, refusals, backlogs, simultaneous opening.

Owns dials under way and what a listener holds. Asks the fabric who an address is and what the path is like; must not know how bytes
travel afterwards. docs/netsim.md, section 3, "Dialling".
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
from collections.abc import Sequence
from contextvars import Context
from typing import TYPE_CHECKING

from netsim import nat
from netsim.connection import Endpoint, FabricConnection
from netsim.wire import Kernel, uniform
from overlay.multiaddr import Multiaddr
from overlay.ports import ProtocolFactory
from overlay.transport.tcp import BACKLOG

if TYPE_CHECKING:
    from netsim.fabric import Fabric

SYN_RETRIES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Between one SYN and the next, as Linux does it; after the last one follows `SYN_LAST_WAIT_S`."""
SYN_LAST_WAIT_S = 64.0

SYN_RECEIVED_S = 63.0
"""How long the far side of a handshake waits for its third segment: Linux's tcp_synack_retries."""


class Dial:
    """One attempt to connect: its SYNs, and the two ends once the other side answered."""

    __slots__ = ("context", "factory", "future", "here", "is_answered", "kernel", "port", "target")

    def __init__(
        self,
        kernel: Kernel,
        context: Context,
        port: int,
        target: Endpoint,
        factory: ProtocolFactory,
        future: asyncio.Future[asyncio.BufferedProtocol],
    ) -> None:
        self.kernel = kernel
        self.context = context
        self.port = port
        self.target = target
        self.factory = factory
        self.future = future
        self.here: FabricConnection | None = None
        self.is_answered = False

    @property
    def key(self) -> tuple[int, Endpoint]:
        return self.port, self.target

    @property
    def is_over(self) -> bool:
        return self.is_answered or self.future.done() or self.kernel.dials.get(self.key) is not self


class FabricListener:
    """A place where connections arrive."""

    def __init__(
        self, kernel: Kernel, context: Context, address: Multiaddr, port: int, factory: ProtocolFactory
    ) -> None:
        self._kernel = kernel
        self._incarnation = kernel.incarnation
        self.context = context
        self.addresses = (address,)
        self.port = port
        self.factory = factory
        self.waiting = 0
        """Connections made that its process hasn't accepted yet."""

    def close(self) -> None:
        """Nothing is accepted any more; what was accepted stays."""
        if self._kernel.incarnation == self._incarnation and self._kernel.listeners.get(self.port) is self:
            del self._kernel.listeners[self.port]


class Handshakes:
    """Every dial of a fabric."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._wire = fabric.wire
        self._loop = fabric.loop

    async def dial(
        self, kernel: Kernel, target: Endpoint, factory: ProtocolFactory, local_port: int | None
    ) -> asyncio.BufferedProtocol:
        """For `FabricTransport`. Raises OSError."""
        future: asyncio.Future[asyncio.BufferedProtocol] = self._loop.create_future()
        port = local_port or self._fabric.free_port(kernel)
        dial = Dial(kernel, self._loop.context_of(kernel.name), port, target, factory, future)
        if dial.key in kernel.dials:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        kernel.dials[dial.key] = dial
        kernel.opened += 1
        self._fabric.trace.add("dial", kernel.name, f"{target[0]}:{target[1]}")
        try:
            self._send_syn(dial, 0)
            return await future
        except asyncio.CancelledError:
            if dial.here is not None and dial.is_answered:
                dial.here.abort()
            raise
        finally:
            if kernel.dials.get(dial.key) is dial:
                del kernel.dials[dial.key]
            if dial.here is not None and not dial.is_answered:
                dial.here.detach()
                self._wire.closed_by_application(dial.here, None)

    def _send_syn(self, dial: Dial, attempt: int) -> None:
        self._wire.events += 1
        if dial.is_over:
            return
        kernel, now = dial.kernel, self._loop.now_s
        found = self._fabric.candidates(kernel, dial.target)
        source: Endpoint | None = (kernel.address, dial.port)
        if not found or not self._is_near(kernel, found[0]):
            source = nat.outbound(kernel.nat, (kernel.address, dial.port), dial.target, now)
        if found and source is not None:
            delay = self._passes(kernel, found[0], attempt)
            if delay is not None:
                self._loop.post_at(now + delay, self._syn_lands, dial, found, source)
        wait = SYN_RETRIES_S[attempt] if attempt < len(SYN_RETRIES_S) else SYN_LAST_WAIT_S
        again = self._send_syn if attempt < len(SYN_RETRIES_S) else self._give_up
        self._loop.post_at(now + wait, again, dial, attempt + 1)

    def _give_up(self, dial: Dial, attempt: int) -> None:
        if not dial.is_over:
            dial.future.set_exception(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _passes(self, source: Kernel, target: Kernel, attempt: int) -> float | None:
        """How long a segment of a handshake takes, or None: it's lost."""
        path = self._fabric.path(source.name, target.name)
        if self._fabric.is_cut(source.name, target.name, path) or not source.is_reachable:
            return None
        if not path.loss and not path.jitter_s:
            return path.delay_s
        key = self._fabric.key_of(source, target, f"handshake {attempt}")
        return None if uniform(key, 1) < path.loss else path.delay_s + path.jitter_s * uniform(key, 2)

    @staticmethod
    def _is_near(one: Kernel, other: Kernel) -> bool:
        """Whether no box is between them."""
        return one is other or (bool(one.nat) and bool(other.nat) and one.nat[0] is other.nat[0])

    def _syn_lands(self, dial: Dial, candidates: Sequence[Kernel], source: Endpoint) -> None:
        self._wire.events += 1
        found = self._behind(dial, candidates, source)
        if found is None or dial.is_over:
            return
        kernel, port = found
        if not kernel.is_reachable:
            return
        back = self._passes(kernel, dial.kernel, -1)
        if dial.here is None:
            meeting = kernel.dials.get((port, source))
            if meeting is not None and not meeting.is_over and meeting is not dial:
                self._meet(dial, meeting, source)
            else:
                listener = kernel.listeners.get(port)
                if listener is None:
                    if back is not None:
                        self._loop.post_at(self._loop.now_s + back, self._refused, dial)
                    return
                if listener.waiting >= BACKLOG:
                    return
                there = self._make_ends(dial, kernel, listener.context, (kernel.address, port), source)
                there.accept = lambda: self._accept(there, listener)
                listener.waiting += 1
                self._loop.post_at(self._loop.now_s + SYN_RECEIVED_S, self._forget_embryo, there, listener)
        if back is not None:
            self._loop.post_at(self._loop.now_s + back, self._answer_lands, dial)

    def _forget_embryo(self, end: FabricConnection, listener: FabricListener) -> None:
        """The third segment never came."""
        if end.accept is not None:
            end.accept = None
            listener.waiting -= 1
            end.kernel.ends.pop(end.serial, None)
            end.unplugged()

    def _behind(self, dial: Dial, candidates: Sequence[Kernel], source: Endpoint) -> tuple[Kernel, int] | None:
        """The machine and port that a SYN came to, past the boxes in front of it."""
        now = self._loop.now_s
        for kernel in candidates:
            if self._is_near(dial.kernel, kernel):
                return kernel, dial.target[1]
            inside = nat.inbound(kernel.nat, dial.target, source, now)
            if inside is not None and inside[0] == kernel.address:
                return kernel, inside[1]
        return None

    def _refused(self, dial: Dial) -> None:
        if not dial.is_over:
            self._fabric.trace.add("refused", dial.kernel.name, f"{dial.target[0]}:{dial.target[1]}")
            dial.future.set_exception(ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))

    def _make_ends(
        self, dial: Dial, kernel: Kernel, context: Context, local: Endpoint, source: Endpoint
    ) -> FabricConnection:
        """Both ends in their kernels; gives the far one, of which its application doesn't know yet."""
        dialler = dial.kernel
        here = FabricConnection(self._wire, dialler, (dialler.address, dial.port), dial.target, dial.context)
        there = FabricConnection(self._wire, kernel, local, source, context)
        here.other, there.other = there, here
        for end, purpose in ((here, "there"), (there, "back")):
            end.key = self._fabric.key_of(dialler, kernel, purpose)
            end.kernel.opened += 1
            end.serial = end.kernel.opened
            end.kernel.ends[end.serial] = end
            self._fabric.lay(end)
        for end in (here, there):
            end.flow.measured(here.path.delay_s + there.path.delay_s)
            if self._is_near(dialler, kernel):
                end.nat_at = math.inf  # no box is between them
        dial.here = here
        return there

    def _meet(self, dial: Dial, meeting: Dial, source: Endpoint) -> None:
        """A SYN came to a port that is itself dialling its sender: simultaneous open, one connection for both."""
        if meeting.here is not None:
            dial.here = meeting.here.other
            return
        kernel = meeting.kernel
        meeting.here = there = self._make_ends(dial, kernel, meeting.context, (kernel.address, meeting.port), source)
        there.accept = lambda: self._met(meeting, there)

    def _met(self, dial: Dial, end: FabricConnection) -> None:
        end.accept = None
        self._open(dial, end)

    def _answer_lands(self, dial: Dial) -> None:
        """SYN-ACK: connected here; the last segment of the handshake, or the first bytes, connect the other side."""
        self._wire.events += 1
        here = dial.here
        if here is None or not dial.kernel.is_reachable:
            return
        if dial.is_over:
            return
        here.accept = None
        self._open(dial, here)
        if not here.is_cut:
            here.flow.last_arrival = when = self._loop.now_s + here.path.delay_s
            self._loop.post_at(when, self._last_lands, here.other)

    def _open(self, dial: Dial, end: FabricConnection) -> None:
        if dial.is_over:
            return
        dial.is_answered = True
        source, target = end.kernel.name, end.other.kernel.name
        self._fabric.trace.add("open", source, f"{target} {end.local[1]} {end.remote[0]}:{end.remote[1]}")
        self._wire.run_in(end, lambda: self._begin_dialled(dial, end))

    @staticmethod
    def _begin_dialled(dial: Dial, end: FabricConnection) -> None:
        try:
            protocol = dial.factory()
        except Exception as error:  # noqa: BLE001 - supervision: goes to who dialled
            end.abort()
            if not dial.future.done():
                dial.future.set_exception(error)
            return
        end.begin(protocol)
        if not dial.future.done():
            dial.future.set_result(protocol)

    def _last_lands(self, end: FabricConnection) -> None:
        self._wire.events += 1
        if end.accept is not None and end.kernel.is_reachable:
            end.accept()

    def _accept(self, end: FabricConnection, listener: FabricListener) -> None:
        end.accept = None
        self._fabric.trace.add("accept", end.kernel.name, f"{end.other.kernel.name} {end.remote[0]}:{end.remote[1]}")

        def begin() -> None:
            listener.waiting -= 1
            end.begin(listener.factory())

        self._wire.run_in(end, begin)
