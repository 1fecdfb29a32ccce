"""The calls that a server knows: first copies, copies under way, answers kept and ids remembered. Pure.

docs/training.md, section 3: one test per cell. Keyed by (peer, call id), so nobody meets another's call. A job's result finds its call
by the number that the table gave, never by the id: a cancelled call's last piece must not answer a new call of the same id.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from blocks.protocol.call_errors import CallFault
from overlay.rpc.types import Message

KEPT_S = 60.0
KEPT_BYTES_MAX = 64 << 20
KEPT_MAX = 256
REMEMBERED_S = 600.0
REMEMBERED_MAX = 65536
REMEMBERED_PER_PEER_MAX = 4096

Key = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Begin:
    """Compute the call; its result is reported under ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody waits for call ``number`` any more: what hasn't begun needn't."""

    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Say ``message`` on ``channel``."""

    channel: object
    message: Message


@dataclass(frozen=True, slots=True)
class Refuse:
    """Say an error on ``channel``."""

    channel: object
    fault: CallFault


CallCommand = Begin | Drop | Answer | Refuse


@dataclass(slots=True)
class _Running:
    key: Key
    digest: bytes
    channels: list[object] = field(default_factory=list)


@dataclass(slots=True)
class _Kept:
    digest: bytes
    message: Message
    size_bytes: int
    since: float


class CallTable:
    """See the module."""

    def __init__(self) -> None:
        self._numbers = 0
        self._running: dict[int, _Running] = {}
        self._number_of: dict[Key, int] = {}
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._remembered: OrderedDict[Key, tuple[bytes, float]] = OrderedDict()
        self._remembered_of: dict[bytes, int] = {}

    @property
    def running_count(self) -> int:
        return len(self._running)

    def receive(self, peer: bytes, call: bytes, digest: bytes, channel: object, now: float) -> list[CallCommand]:
        """A checked request came."""
        self._forget(now)
        key = (peer, call)
        number = self._number_of.get(key)
        if number is not None:
            running = self._running[number]
            if running.digest != digest:
                return [Refuse(channel, _conflict())]
            running.channels.append(channel)
            return []
        kept = self._kept.get(key)
        if kept is not None:
            return [Answer(channel, kept.message) if kept.digest == digest else Refuse(channel, _conflict())]
        remembered = self._remembered.get(key)
        if remembered is not None:
            if remembered[0] != digest:
                return [Refuse(channel, _conflict())]
            return [Refuse(channel, CallFault("call-expired", "The answer is no longer kept; ask with a new id."))]
        self._numbers += 1
        self._number_of[key] = self._numbers
        self._running[self._numbers] = _Running(key, digest, [channel])
        return [Begin(self._numbers)]

    def channel_lost(self, channel: object) -> list[CallCommand]:
        """A stream was reset, or ended, before its answer."""
        for number, running in self._running.items():
            if channel in running.channels:
                running.channels.remove(channel)
                if running.channels:
                    return []
                self._end(number)
                return [Drop(number)]
        return []

    def answered(self, number: int, message: Message, now: float) -> list[CallCommand]:
        """Call ``number`` was computed."""
        running = self._end(number)
        if running is None:
            return []
        size = sum(part.size_bytes for part in message.parts)
        if size <= KEPT_BYTES_MAX:
            self._kept[running.key] = _Kept(running.digest, message, size, now)
            self._kept_bytes += size
        else:
            self._remember(running.key, running.digest, now)
        self._forget(now)
        return [Answer(channel, message) for channel in running.channels]

    def failed(self, number: int, fault: CallFault) -> list[CallCommand]:
        """Call ``number`` can't be computed: said to all who wait, and not kept, so that a later copy is a first one."""
        running = self._end(number)
        return [] if running is None else [Refuse(channel, fault) for channel in running.channels]

    def channels_of(self, number: int) -> tuple[object, ...]:
        """Who waits for call ``number``."""
        running = self._running.get(number)
        return () if running is None else tuple(running.channels)

    def _end(self, number: int) -> _Running | None:
        running = self._running.pop(number, None)
        if running is not None:
            del self._number_of[running.key]
        return running

    def _forget(self, now: float) -> None:
        """Answers in excess or out of date, and ids likewise; the oldest first."""
        while self._kept:
            key, kept = next(iter(self._kept.items()))
            in_excess = len(self._kept) > KEPT_MAX or self._kept_bytes > KEPT_BYTES_MAX
            if not in_excess and now - kept.since < KEPT_S:
                break
            del self._kept[key]
            self._kept_bytes -= kept.size_bytes
            self._remember(key, kept.digest, kept.since)
        while self._remembered:
            key, (_, since) = next(iter(self._remembered.items()))
            if len(self._remembered) <= REMEMBERED_MAX and now - since < REMEMBERED_S:
                break
            self._drop_id(key)

    def _remember(self, key: Key, digest: bytes, since: float) -> None:
        peer = key[0]
        if self._remembered_of.get(peer, 0) >= REMEMBERED_PER_PEER_MAX:
            self._drop_id(next(known for known in self._remembered if known[0] == peer))
        self._remembered[key] = (digest, since)
        self._remembered_of[peer] = self._remembered_of.get(peer, 0) + 1

    def _drop_id(self, key: Key) -> None:
        del self._remembered[key]
        left = self._remembered_of[key[0]] - 1
        if left:
            self._remembered_of[key[0]] = left
        else:
            del self._remembered_of[key[0]]


def _conflict() -> CallFault:
    return CallFault("conflict", "Another call has that id; ask with a new one.")
