"""The serving side's shell: streams to the hop machine and back, the machine to the device and back.

Owns `/peerd/session/1` and `/peerd/data/1` on a host, the data streams to next hops, and the machine's timer. Everything
between a socket callback and the device's queue, and between the device's answer and `transport.write`, happens in one call
chain without a task switch. A node that is its own neighbour hands messages over in process. Knows nothing of torch.

The data lane verifies late: a window is computed while its signature is checked, and the check ends before the output is released
(DESIGN 5, Messages).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from blocks.protocol.commands import (
    CloseChannel,
    CloseNext,
    EdgeKey,
    HopCommand,
    OpenNext,
    Reply,
    SendNext,
    Submit,
)
from blocks.protocol.device import Device, JobResult, LeaseKey, SpanJob
from blocks.protocol.hops import Hops
from blocks.session_directory import SessionDirectory
from overlay.errors import DialError, PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Clock
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message
from overlay.stream import Priority, Stream

log = logging.getLogger(__name__)

SESSION_PROTOCOL = "/peerd/session/1"
DATA_PROTOCOL = "/peerd/data/1"
EDGE_OPEN_TIMEOUT_S = 8.0
EDGE_QUEUE_MESSAGES = 1024
STREAMS_PER_PEER = 512
RESULT_KIND = "result"


class Channel(Protocol):
    """Either kind of conversation, as commands name it."""

    def send(self, message: Message) -> None: ...
    def close(self) -> None: ...
    def reset(self, code: str = "") -> None: ...


class _Inbound:
    """One accepted stream: a control or a data lane, told by its protocol."""

    def __init__(self, service: SpanService, stream: Stream, identity: Identity, *, is_data: bool) -> None:
        self._service = service
        self.origin = stream.remote_peer.multihash
        self.coming_bytes = 0
        """Deep prompts that were let in, and are on their way."""
        # What came already is decoded as soon as there is a channel.
        admit = None if is_data else self._admit
        self._channel = MessageChannel(stream, identity, verify_first=not is_data, admit=admit)
        self._is_data = is_data
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel.set_receiver(self)

    def _admit(self, fields: Mapping[str, Any], size_bytes: int) -> bool:
        if not size_bytes:
            return True
        admitted = self._service.admits_prompts(fields, size_bytes, self)
        self.coming_bytes = size_bytes if admitted else 0
        return admitted

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def close(self) -> None:
        self._channel.close()
        self._settle()

    def reset(self, code: str = "") -> None:
        self._channel.reset(code)
        self._settle()

    def message_received(self, message: Message) -> None:
        self.coming_bytes = 0
        if self._is_data:
            self._service.data_received(message, self)
        else:
            self._service.control_received(message, self)

    def verify(self, message: Message) -> bool:
        return self._channel.verify(message)

    def channel_lost(self, error: PeerdError | None) -> None:
        self.coming_bytes = 0
        self._service.channel_ended(self)
        self._settle()

    def _settle(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class _Edge:
    """The outbound data stream of one hop: queues until it is open."""

    def __init__(self) -> None:
        self.channel: MessageChannel | None = None
        self.is_local = False
        self.closing = False
        self.waiting: deque[Message] = deque()
        self.task: asyncio.Task[None] | None = None


class _EdgeEars:
    """An outbound data lane hears refusals of what we sent, and its end."""

    def __init__(self, service: SpanService, key: EdgeKey, channel: MessageChannel) -> None:
        self._service = service
        self._key = key
        self._channel = channel
        self.origin = channel.remote_peer

    def message_received(self, message: Message) -> None:
        self._service.backward_received(message, self)

    def channel_lost(self, error: PeerdError | None) -> None:
        self._service.edge_ended(self._key, error)

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def close(self) -> None:
        self._channel.close()

    def reset(self, code: str = "") -> None:
        self._channel.reset(code)


class SpanService:
    """``async with SpanService(...)``; see the module. ``lease_used`` hears of every window computed for a lease."""

    def __init__(
        self,
        host: Host,
        device: Device,
        hops: Hops,
        directory: SessionDirectory,
        clock: Clock,
        *,
        lease_used: Callable[[LeaseKey], None] | None = None,
    ) -> None:
        self._host = host
        self._device = device
        self._hops = hops
        self._directory = directory
        self._clock = clock
        self._lease_used = lease_used
        self._self_peer = host.peer_id.multihash
        self._edges: dict[EdgeKey, _Edge] = {}
        self._controls: dict[int, _Inbound] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._running = False
        self._stopped = False
        self.drained = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._host.serve(SESSION_PROTOCOL, self._serve_control, max_inbound_per_peer=STREAMS_PER_PEER)
        self._host.serve(
            DATA_PROTOCOL, self._serve_data, max_inbound_per_peer=STREAMS_PER_PEER, priority=Priority.DECODE
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._host.unserve(SESSION_PROTOCOL)
        self._host.unserve(DATA_PROTOCOL)
        if self._timer is not None:
            self._timer.cancel()
        for key in list(self._edges):
            self._close_edge(key)
        assert self._tasks is not None
        await self._tasks.__aexit__(None, None, None)

    # --- inbound ---

    async def _serve_control(self, stream: Stream) -> None:
        inbound = _Inbound(self, stream, self._host.identity, is_data=False)
        self._controls[id(inbound)] = inbound
        try:
            await inbound.ended
        finally:
            del self._controls[id(inbound)]

    async def _serve_data(self, stream: Stream) -> None:
        await _Inbound(self, stream, self._host.identity, is_data=True).ended

    def admits_prompts(self, fields: Mapping[str, Any], size_bytes: int, channel: _Inbound) -> bool:
        """Whether the parts of a control message may be read; the driver is told at once where they may not."""
        coming = size_bytes + sum(other.coming_bytes for other in self._controls.values())
        if fields.get("k") == "open" and self._hops.has_room_for_prompts(channel.origin, coming):
            return True
        header = Message(str(fields.get("k")), fields, (), channel.origin, self._self_peer)
        asyncio.get_running_loop().call_soon(self._turn_away, header, channel)
        return False

    def _turn_away(self, header: Message, channel: _Inbound) -> None:
        if not self._stopped:
            self._hops.turn_away(header, channel.origin, channel)
            self._execute()

    def control_received(self, message: Message, channel: _Inbound) -> None:
        """A driver's word, verified."""
        self._hops.receive(message, channel.origin, channel, self._clock.now())
        self._execute()

    def data_received(self, message: Message, channel: _Inbound) -> None:
        """A window for a hop here, or a result for a driver here."""
        if message.kind == RESULT_KIND:
            driver = self._directory.find(message.header.get("s"))
            if driver is not None:
                if not channel.verify(message):
                    channel.reset("bad-signature")
                    return
                driver.data_message(message, channel.origin, True)
            return
        now = self._clock.now()
        self._hops.receive(message, channel.origin, channel, now)
        self._execute()
        # The device is at work by now; nothing of it leaves before this line has run, since completions come by the loop.
        if not channel.verify(message):
            self._hops.refuse(message, channel, ProtocolViolation("A window's signature is wrong."), now)
            self._execute()

    def backward_received(self, message: Message, channel: _EdgeEars) -> None:
        """What the next hop says against the stream: gaps and refusals."""
        self._hops.receive(message, channel.origin, channel, self._clock.now())
        self._execute()

    def channel_ended(self, channel: _Inbound) -> None:
        """An inbound lane is gone."""
        if not self._stopped:
            self._hops.channel_lost(channel, self._clock.now())
            self._execute()

    def receive_local(self, message: Message, channel: object) -> None:
        """A message from this very node (its driver, or its other hop)."""
        self._hops.receive(message, self._self_peer, channel, self._clock.now())
        self._execute()

    def local_channel_ended(self, channel: object) -> None:
        """An in-process control channel is gone."""
        self._hops.channel_lost(channel, self._clock.now())
        self._execute()

    # --- the machine's wishes ---

    def _execute(self) -> None:
        """Carry out commands in order; what they lead to at once is carried out in the same pass."""
        if self._running:
            return
        self._running = True
        try:
            while commands := self._hops.poll_commands():
                for command in commands:
                    self._do(command)
        finally:
            self._running = False
        self._arm()
        if self._hops.is_drained:
            self.drained.set()

    def _do(self, command: HopCommand) -> None:
        if isinstance(command, Submit):
            self._device.submit((command.job,), self._job_done)
        elif isinstance(command, SendNext):
            self._send_next(command.edge, command.message)
        elif isinstance(command, Reply):
            self._reply(command.channel, command.message)
        elif isinstance(command, OpenNext):
            self._open_next(command)
        elif isinstance(command, CloseNext):
            self._close_edge(command.edge)
        elif isinstance(command, CloseChannel):
            self._close_channel(command)

    def _job_done(self, result: JobResult) -> None:
        if not self._stopped:
            if self._lease_used is not None and isinstance(result.job, SpanJob):
                self._lease_used(result.job.lease)
            self._hops.job_done(result, self._clock.now())
            self._execute()

    def _reply(self, channel: object, message: Message) -> None:
        try:
            channel.send(message)  # type: ignore[attr-defined]
        except PeerdError as error:
            log.debug("a %s could not be sent: %s", message.kind, error)

    def _close_channel(self, command: CloseChannel) -> None:
        channel: Channel = command.channel  # type: ignore[assignment]
        if command.code:
            log.info("a session channel was refused: %s", command.code)
            channel.reset(command.code)
        else:
            channel.close()

    # --- edges ---

    def _open_next(self, command: OpenNext) -> None:
        edge = self._edges[command.edge] = _Edge()
        if command.peer == self._self_peer:
            edge.is_local = True
            return
        assert self._tasks is not None
        edge.task = self._tasks.create_task(self._connect_edge(command, edge), name=f"edge {command.edge.hop_index}")

    async def _connect_edge(self, command: OpenNext, edge: _Edge) -> None:
        try:
            peer = PeerId.from_bytes(command.peer)
            addresses = [Multiaddr.parse(address) for address in command.addresses]
            stream = await self._host.open_stream(
                peer, DATA_PROTOCOL, addresses=addresses, priority=Priority.DECODE, timeout_s=EDGE_OPEN_TIMEOUT_S
            )
        except PeerdError as error:
            if self._edges.get(command.edge) is edge:
                del self._edges[command.edge]
                self._hops.next_lost(command.edge, error, self._clock.now())
                self._execute()
            return
        if self._edges.get(command.edge) is not edge:
            stream.reset("route-left")
            return
        edge.channel = MessageChannel(stream, self._host.identity)
        edge.channel.set_receiver(_EdgeEars(self, command.edge, edge.channel))
        while edge.waiting and edge.channel is not None:
            self._transmit(command.edge, edge, edge.waiting.popleft())

    def _send_next(self, key: EdgeKey, message: Message) -> None:
        edge = self._edges.get(key)
        if edge is None:
            return
        if edge.is_local:
            asyncio.get_running_loop().call_soon(self._deliver_local, key, message)
        elif edge.channel is None:
            if len(edge.waiting) >= EDGE_QUEUE_MESSAGES:
                self._edge_failed(key, DialError("The next hop does not answer."))
                return
            edge.waiting.append(message)
        else:
            self._transmit(key, edge, message)

    def _transmit(self, key: EdgeKey, edge: _Edge, message: Message) -> None:
        assert edge.channel is not None
        try:
            edge.channel.send(message)
        except PeerdError as error:
            self._edge_failed(key, error)

    def _deliver_local(self, key: EdgeKey, message: Message) -> None:
        if self._stopped:
            return
        if message.kind == RESULT_KIND:
            driver = self._directory.find(key.session)
            if driver is not None:
                driver.data_message(message, self._self_peer, True)
        else:
            self.receive_local(message, _LocalBack(self, key))

    def _edge_failed(self, key: EdgeKey, error: PeerdError) -> None:
        self._edges.pop(key, None)
        self._hops.next_lost(key, error, self._clock.now())
        if not self._running:
            self._execute()

    def edge_ended(self, key: EdgeKey, error: PeerdError | None) -> None:
        """The stream to the next hop ended; asked for, or not."""
        edge = self._edges.pop(key, None)
        if edge is not None and not self._stopped:
            self._hops.next_lost(key, error or DialError("The next hop ended the stream."), self._clock.now())
            self._execute()

    def _close_edge(self, key: EdgeKey) -> None:
        edge = self._edges.pop(key, None)
        if edge is None:
            return
        if edge.task is not None and edge.channel is None:
            edge.task.cancel()
        if edge.channel is not None:
            edge.channel.close()

    # --- time and the end ---

    def _arm(self) -> None:
        due = self._hops.next_timeout()
        if due == self._timer_at or self._stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = None
        if due is not None:
            delay = max(0.0, due - self._clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = None
        self._hops.on_timeout(self._clock.now())
        self._execute()

    async def drain(self, deadline_s: float) -> None:
        """Tell drivers to move and serve until they have, or ``deadline_s`` has passed."""
        self._hops.drain(deadline_s, self._clock.now())
        self._execute()
        if self._hops.session_count:
            try:
                async with asyncio.timeout(deadline_s):
                    await self.drained.wait()
            except TimeoutError:
                log.info("%d sessions had not moved in time", self._hops.session_count)


class _LocalBack:
    """What a hop of this node says back to the hop before it, which is of this node too."""

    __slots__ = ("_key", "_service")

    def __init__(self, service: SpanService, key: EdgeKey) -> None:
        self._service = service
        self._key = key

    def send(self, message: Message) -> None:
        asyncio.get_running_loop().call_soon(self._service.receive_local, replace(message), self)

    def close(self) -> None:
        """Nothing is held."""

    def reset(self, code: str = "") -> None:
        self._service.edge_ended(self._key, ProtocolViolation(f"The next hop refused a message ({code})."))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LocalBack) and other._key == self._key
