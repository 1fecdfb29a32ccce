"""One end of a simulated connection: what `asyncio`'s selector transport is to a socket, and the socket's receiving half.

Owns the transport's own write buffer with its water marks, the bytes received and not yet read, and the order in which the
application hears of bytes, the end and errors. The kernel's callers (`receive`, `broken`, `kick`) come from the world's timers;
the application is called in its host's context, and when that stands still its callbacks wait in the loop. Must not know
paths, cards or who else there is: `netsim.wire` carries what the flow releases. docs/netsim.md, section 3.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextvars import Context
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

from netsim.flow import CHUNK_BYTES_MAX, FIN, Fin, Flow, Path, Payload

if TYPE_CHECKING:
    from netsim.wire import Kernel, Line, Wire

WRITE_HIGH_WATER_BYTES = 64 << 10
"""asyncio's default."""

Endpoint = tuple[str, int]


class Socket(IntEnum):
    """What the kernel has of this end."""

    OPEN = 0
    ORPHANED = 1
    """The application closed it: what it wrote still goes out, then FIN; bytes that come are answered with a reset."""
    DEAD = 2
    """Reset, given up, or over; bytes that come are answered with a reset."""


OPEN, ORPHANED, DEAD = Socket
"""By name: members of an enumeration are slow to look up, and every arrival does."""


class FabricConnection(asyncio.Transport):
    """See the module."""

    __slots__ = (
        "_closing",
        "_conn_lost",
        "_drain_scheduled",
        "_eof",
        "_high",
        "_low",
        "_protocol",
        "_reading_paused",
        "_writer_scheduled",
        "_writing_paused",
        "accept",
        "ack_armed",
        "arrived_bytes",
        "backlog",
        "context",
        "cut_after",
        "draws",
        "error",
        "flow",
        "has_fin",
        "held_until",
        "inbox",
        "inbox_bytes",
        "is_cut",
        "is_forgotten",
        "is_plain",
        "is_queued",
        "is_waiting",
        "kernel",
        "key",
        "local",
        "nat_at",
        "other",
        "path",
        "probe_armed",
        "remote",
        "router",
        "rto_armed",
        "serial",
        "socket",
        "window_bytes",
        "wire",
    )

    other: FabricConnection

    def __init__(self, wire: Wire, kernel: Kernel, local: Endpoint, remote: Endpoint, context: Context) -> None:
        self.wire = wire
        self.kernel = kernel
        self.local = local
        self.remote = remote
        self.context = context
        self.flow = Flow(kernel.card)
        self.window_bytes = kernel.card.receive_window_bytes
        self.socket: Socket = OPEN
        self.path = Path()
        self.router: Line | None = None
        self.is_cut = False
        self.is_plain = False
        """Whether all that happens to a chunk on its path is that it takes the delay."""
        self.cut_after: int | None = None
        self.arrived_bytes = 0
        self.serial = 0
        self.key = 0
        self.draws = 0
        self.nat_at = 0.0
        self.is_forgotten = False
        """Whether a box on the way no longer knows the connection."""
        self.is_queued = self.is_waiting = self.ack_armed = self.rto_armed = self.probe_armed = False
        self.accept: Callable[[], None] | None = None
        """What is still to be done before the application knows of this end."""
        self.inbox: list[Payload] = []
        self.inbox_bytes = 0
        self.held_until = 0.0
        self.has_fin = False
        self.error: OSError | None = None
        self._protocol: asyncio.BufferedProtocol | None = None
        self.backlog: bytearray | None = None
        """What the kernel has had no room for yet: the transport's own write buffer."""
        self._high, self._low = WRITE_HIGH_WATER_BYTES, WRITE_HIGH_WATER_BYTES // 4
        self._writing_paused = self._reading_paused = self._closing = self._eof = self._conn_lost = False
        self._drain_scheduled = self._writer_scheduled = False

    # --- asyncio.Transport ---

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self.remote
        return self.local if name == "sockname" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.BufferedProtocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        """What the kernel has no room for waits here, and is what the water marks look at."""
        if self._eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._conn_lost or not data:
            return
        if self.backlog:
            self.backlog += data
            self._maybe_pause()
            return
        if self.error is not None:
            self._fatal(self.error)
            return
        flow = self.flow
        count = len(data)
        if flow.unsent_bytes + count <= flow.most_unsent:
            flow.unsent.append(bytes(data))
            flow.unsent_bytes += count
        else:
            room = flow.room
            view = memoryview(data)
            if room:
                flow.queue(bytes(view[:room]))
            self.backlog = bytearray(view[room:])
        self.wire.send(self)
        if self.backlog:
            self._maybe_pause()

    def write_eof(self) -> None:
        if self._closing or self._eof:
            return
        self._eof = True
        if not self.backlog:
            self._shut()

    def can_write_eof(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = WRITE_HIGH_WATER_BYTES if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._maybe_pause()

    def get_write_buffer_size(self) -> int:
        return len(self.backlog) if self.backlog is not None else 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def pause_reading(self) -> None:
        if not self._closing:
            self._reading_paused = True

    def resume_reading(self) -> None:
        if self._closing or not self._reading_paused:
            return
        self._reading_paused = False
        self._schedule_drain()

    def is_reading(self) -> bool:
        return not self._closing and not self._reading_paused

    def close(self) -> None:
        """What was written still goes out; connection_lost when the kernel has all of it."""
        if self._closing:
            return
        self._closing = True
        if not self.backlog:
            self._conn_lost = True
            self.wire.loop.call_soon(self._lost, None)

    def abort(self) -> None:
        """What the kernel doesn't have yet is dropped; the rest is as with `close`, as the selector transport does it."""
        self._force_close(None)

    # --- the application's side ---

    def begin(self, protocol: asyncio.BufferedProtocol) -> None:
        """Tell the application, in its context, that the connection is made."""
        self._protocol = protocol
        try:
            protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - supervision: as the selector transport does
            self._fatal(error)

    def _maybe_pause(self) -> None:
        if self._writing_paused or self.backlog is None or len(self.backlog) <= self._high or self._protocol is None:
            return
        self._writing_paused = True
        self._call(self._protocol.pause_writing, "pause_writing")

    def _call(self, callback: Callable[[], None], name: str) -> None:
        try:
            callback()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - supervision: as the selector transport does
            self.wire.loop.call_exception_handler(
                {"message": f"protocol.{name}() failed", "exception": error, "transport": self}
            )

    def _write_ready(self) -> None:
        """The kernel has room again."""
        self._writer_scheduled = False
        buffer = self.backlog
        if self._conn_lost or not buffer:
            return
        if self.error is not None:
            self._fatal(self.error)
            return
        room = self.flow.room
        if room:
            self.flow.queue(bytes(buffer[:room]))
            del buffer[:room]
        if not buffer:
            self.backlog = None
        self.wire.send(self)
        if self._writing_paused and len(buffer) <= self._low and self._protocol is not None:
            self._writing_paused = False
            self._call(self._protocol.resume_writing, "resume_writing")
        if self.backlog:
            self.wake_writer()
        elif self._closing:
            self._conn_lost = True
            self._lost(None)
        elif self._eof:
            self._shut()

    def _shut(self) -> None:
        self.flow.fin_wanted = True
        self.wire.send(self)

    def _fatal(self, error: BaseException) -> None:
        if not isinstance(error, OSError):
            self.wire.loop.call_exception_handler(
                {"message": "fatal error on a transport", "exception": error, "transport": self}
            )
        self._force_close(error)

    def _force_close(self, error: BaseException | None) -> None:
        if self._conn_lost:
            return
        self.backlog = None
        self._closing = self._conn_lost = True
        self.wire.loop.call_soon(self._lost, error)

    def _lost(self, error: BaseException | None) -> None:
        protocol, self._protocol = self._protocol, None
        try:
            if protocol is not None:
                protocol.connection_lost(cast(Exception | None, error))
        finally:
            self.wire.closed_by_application(self, error)

    # --- reading ---

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled and (self.inbox or self.error is not None):
            self._drain_scheduled = True
            self.wire.loop.call_soon(self._drain, context=self.context)

    def _drain(self) -> None:
        """One read, as when the socket has become readable; the next one is the next turn's."""
        self._drain_scheduled = False
        if self._closing or self._reading_paused or self._protocol is None or self.held_until > self.wire.loop.now_s:
            return
        if not self.inbox:
            if self.error is not None:
                self._fatal(self.error)
            return
        if isinstance(self.inbox[0], Fin):
            self.inbox.clear()
            self._end()
        else:
            was_full = self.inbox_bytes + self.other.flow.on_wire_bytes + CHUNK_BYTES_MAX > self.window_bytes
            self._feed(self._take_some())
            if was_full:
                self.wire.window_opened(self)
        self._schedule_drain()

    def _take_some(self) -> bytes | memoryview:
        """The oldest bytes, at most a chunk."""
        pieces: list[bytes | memoryview] = []
        size = 0
        for payload in self.inbox:
            if isinstance(payload, Fin) or (pieces and size + len(payload) > CHUNK_BYTES_MAX):
                break
            pieces.append(payload)
            size += len(payload)
        del self.inbox[: len(pieces)]
        self.inbox_bytes -= size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _feed(self, data: Any) -> None:
        """Hand bytes to the protocol, at most as many at a time as its buffer holds."""
        left = data
        try:
            while (protocol := self._protocol) is not None:
                buffer: Any = protocol.get_buffer(-1)
                count = len(left)
                if count <= len(buffer):
                    buffer[:count] = left
                    protocol.buffer_updated(count)
                    return
                count = len(buffer)
                if not count:
                    raise RuntimeError("get_buffer() returned an empty buffer")
                left = memoryview(left)
                buffer[:count] = left[:count]
                protocol.buffer_updated(count)
                left = left[count:]
                if self._closing or self._reading_paused:
                    self.inbox.insert(0, left)
                    self.inbox_bytes += len(left)
                    return
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - supervision: as the selector transport does
            self._fatal(error)

    def _end(self) -> None:
        keep_open = False
        try:
            if self._protocol is not None:
                keep_open = bool(self._protocol.eof_received())
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - supervision: as the selector transport does
            self._fatal(error)
            return
        if not keep_open:
            self.close()

    # --- the kernel's side: only from the world's own timers ---

    def receive(self, payload: Payload, late_s: float) -> None:
        """Bytes, or their end, came in order; ``late_s`` is how long a hole before them takes to fill."""
        loop = self.wire.loop
        if late_s:
            self.held_until = max(self.held_until, loop.now_s + late_s)
            loop.post_at(self.held_until, self.kick)
        if (
            self.inbox
            or self._reading_paused
            or self._drain_scheduled
            or payload is FIN
            or self.held_until > loop.now_s
            or (loop.is_watching and loop.is_frozen(self.kernel.name))
        ):
            self.has_fin = self.has_fin or payload is FIN
            self.inbox.append(payload)
            self.inbox_bytes += len(payload)
            self.kick()
        elif not self._closing:
            self.context.run(self._feed, payload)

    def kick(self) -> None:
        """Something can be read: let the application read it, now or when its process goes on."""
        if self._drain_scheduled or self._reading_paused or self._closing or self.held_until > self.wire.loop.now_s:
            return
        if self.wire.loop.is_frozen(self.kernel.name):
            self._schedule_drain()
        else:
            self.context.run(self._drain)

    def wake_writer(self) -> None:
        """The kernel can take more; the application's loop hears of it at its next turn."""
        if self.backlog and not self._writer_scheduled and self.flow.is_writable:
            self._writer_scheduled = True
            self.wire.loop.call_soon(self._write_ready, context=self.context)

    def broken(self, error: OSError) -> None:
        """The kernel gave the connection up; the application hears of it when it reads or writes."""
        was_open = self.socket is OPEN
        self.socket = DEAD
        self.flow.clear()
        if not was_open:
            return
        self.error = error
        if self.has_fin and isinstance(error, ConnectionResetError):  # as Linux tells it from a reset out of the blue
            self.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
        if self.backlog and not self._writer_scheduled:
            self._writer_scheduled = True
            self.wire.loop.call_soon(self._write_ready, context=self.context)
        self.kick()

    def orphan(self) -> bool:
        """The application, or its process, is gone. False: there is unread data, so the other end is to be reset."""
        self.socket = ORPHANED
        self.backlog = None
        self._closing = self._conn_lost = True
        is_unread = self.inbox_bytes > 0
        self.inbox.clear()
        self.inbox_bytes = 0
        if not is_unread:
            self.flow.fin_wanted = self.flow.fin_wanted or not self._eof
        return not is_unread

    def unplugged(self) -> None:
        """The machine has no power: its kernel knows nothing of this connection any more."""
        self.socket = DEAD
        self.flow.clear()

    def detach(self) -> None:
        """Its process is dead, or its host: nothing of it comes or goes any more.

        The process isn't called again either where the loop mutes it; one that lives on, as in tests, hears that it lost its end.
        """
        self.backlog = None
        self._closing = self._conn_lost = True
        if self._protocol is not None:
            error = ConnectionAbortedError(errno.ECONNABORTED, "Software caused connection abort")
            self.wire.loop.call_soon(self._lost, error, context=self.context)
