"""A driver's streams, by epoch: a control lane to every hop and a data lane to the first.

Owns opening (with what is sent meanwhile queued), and the in-process lanes of a node that is its own hop. Tells the driver's shell
of messages and of ends that nobody asked for; what they mean is the driver machine's business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from blocks.protocol.commands import CloseHops, OpenHop
from blocks.protocol.messages import Epoch
from blocks.service import DATA_PROTOCOL, SESSION_PROTOCOL, SpanService
from overlay.errors import LimitExceeded, PeerdError, StreamClosed, TimedOut
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message
from overlay.stream import Priority

LANE_OPEN_TIMEOUT_S = 3.0
"""Of a session's first try with a peer: a lost packet of TCP's handshake and some round trips. Others serve the same blocks ..."""
LANE_OPEN_TIMEOUT_MAX_S = 8.0
"""... and where none does, each further try is given twice as long, up to this."""
LANE_QUEUE_MESSAGES = 4096
CONTROL, DATA = "control", "data"


class LaneEars(Protocol):
    """What the driver's shell hears."""

    def lane_message(self, message: Message, origin: bytes) -> None: ...
    def lane_lost(self, epoch: Epoch, hop_index: int, error: PeerdError) -> None: ...


class _RemoteLane:
    """A stream to a hop, opened in the background."""

    def __init__(self, lanes: Lanes, epoch: Epoch, hop: OpenHop, kind: str) -> None:
        self._lanes = lanes
        self._epoch = epoch
        self._hop_index = hop.hop_index
        self._peer = hop.hop.peer
        self._addresses = hop.hop.addresses
        self._kind = kind
        self._channel: MessageChannel | None = None
        self._waiting: deque[Message] = deque()
        self._closing = False
        self._task = lanes.tasks.create_task(self._open(), name=f"{kind} lane to hop {hop.hop_index}")

    async def _open(self) -> None:
        host = self._lanes.host
        is_data = self._kind == DATA
        try:
            stream = await host.open_stream(
                PeerId.from_bytes(self._peer),
                DATA_PROTOCOL if is_data else SESSION_PROTOCOL,
                addresses=[Multiaddr.parse(address) for address in self._addresses],
                priority=Priority.DECODE if is_data else Priority.CONTROL,
                timeout_s=self._lanes.open_timeout_s(self._peer),
            )
        except PeerdError as error:
            if isinstance(error, TimedOut):
                self._lanes.open_timed_out(self._peer)
            self._lost(error)
            return
        channel = self._channel = MessageChannel(stream, host.identity)
        channel.set_receiver(self)
        try:
            while self._waiting:
                channel.send(self._waiting.popleft())
        except PeerdError as error:
            self._lost(error)
        if self._closing:
            channel.close()

    def send(self, message: Message) -> None:
        if self._channel is None:
            if len(self._waiting) < LANE_QUEUE_MESSAGES:
                self._waiting.append(message)
                return
            self._lost(LimitExceeded("A server does not take its connection in time."))
            return
        try:
            self._channel.send(message)
        except PeerdError as error:
            self._lost(error)

    def close(self) -> None:
        """Finish after what was sent; a stream that never opened is given up (its hop has nothing to free)."""
        self._closing = True
        if self._channel is not None:
            self._channel.close()
        elif not self._waiting:
            self._task.cancel()

    def message_received(self, message: Message) -> None:
        self._lanes.ears.lane_message(message, self._peer)

    def channel_lost(self, error: PeerdError | None) -> None:
        self._lost(error or StreamClosed("A server ended its part in the session."))

    def _lost(self, error: PeerdError) -> None:
        if not self._closing:
            self._closing = True
            self._lanes.ears.lane_lost(self._epoch, self._hop_index, error)


class _LocalLane:
    """This node's own hop: the same messages, handed over by the loop's next turn."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._back = _LocalBack(lanes)

    def send(self, message: Message) -> None:
        asyncio.get_running_loop().call_soon(self._lanes.service.receive_local, message, self._back)

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self._lanes.service.local_channel_ended, self._back)


class _LocalBack:
    """How a hop of this node answers its own driver."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def send(self, message: Message) -> None:
        asyncio.get_running_loop().call_soon(self._lanes.ears.lane_message, message, self._lanes.self_peer)

    def close(self) -> None:
        """Nothing is held."""

    def reset(self, code: str = "") -> None:
        """Our own hop refused our own message: the machine's error message says it."""


class Lanes:
    """All lanes of one session."""

    def __init__(self, host: Host, service: SpanService, tasks: asyncio.TaskGroup, ears: LaneEars) -> None:
        self.host = host
        self.service = service
        self.tasks = tasks
        self.ears = ears
        self.self_peer = host.peer_id.multihash
        self._lanes: dict[tuple[Epoch, str, int], _RemoteLane | _LocalLane] = {}
        self._timed_out: dict[bytes, int] = {}

    def open_timeout_s(self, peer: bytes) -> float:
        """How long a lane to ``peer`` may take to open."""
        doubled = min(self._timed_out.get(peer, 0), 8)
        return min(LANE_OPEN_TIMEOUT_S * (1 << doubled), LANE_OPEN_TIMEOUT_MAX_S)

    def open_timed_out(self, peer: bytes) -> None:
        """``peer`` had its time; whom this session tries in vain is soon known, and so bounded."""
        self._timed_out[peer] = self._timed_out.get(peer, 0) + 1

    def open(self, command: OpenHop) -> None:
        """Open the control lane to a hop, and the data lane to the first."""
        for kind in (CONTROL, DATA) if command.hop_index == 0 else (CONTROL,):
            if command.hop.peer == self.self_peer:
                lane: _RemoteLane | _LocalLane = _LocalLane(self)
            else:
                lane = _RemoteLane(self, command.epoch, command, kind)
            self._lanes[command.epoch, kind, command.hop_index] = lane

    def send_control(self, epoch: Epoch, hop_index: int, message: Message) -> None:
        """To a hop of that epoch; a lane that is gone takes nothing."""
        lane = self._lanes.get((epoch, CONTROL, hop_index))
        if lane is not None:
            lane.send(message)

    def send_data(self, epoch: Epoch, message: Message) -> None:
        """To hop 0 of that epoch."""
        lane = self._lanes.get((epoch, DATA, 0))
        if lane is not None:
            lane.send(message)

    def close(self, command: CloseHops) -> None:
        """Finish every lane of an epoch."""
        for key in [key for key in self._lanes if key[0] == command.epoch]:
            self._lanes.pop(key).close()
