"""What the overlay's shells are given: clocks, randomness, storage and transports. Types only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from overlay.multiaddr import Multiaddr

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]


class Clock(Protocol):
    """Monotonic seconds."""

    def now(self) -> float: ...


class WallClock(Protocol):
    """Unix seconds: home clocks are wrong, so these only order one publisher's own records."""

    def now_s(self) -> float: ...


class Randomness(Protocol):
    """Unpredictable in the real world, seeded in the simulator."""

    def token(self, length: int) -> bytes: ...
    def uniform(self, low: float, high: float) -> float: ...
    def below(self, bound: int) -> int: ...


class Storage(Protocol):
    """Named byte strings that survive a restart; ``save`` is atomic and synced."""

    def load(self, name: str) -> bytes | None: ...
    def save(self, name: str, data: bytes) -> None: ...


class Listener(Protocol):
    """A place where connections arrive."""

    @property
    def addresses(self) -> tuple[Multiaddr, ...]: ...
    def close(self) -> None: ...


class Transport(Protocol):
    """Byte pipes as asyncio's Transport/BufferedProtocol pairs, so that in-memory links run the same shells."""

    def can_dial(self, address: Multiaddr) -> bool: ...
    async def dial(self, address: Multiaddr, factory: ProtocolFactory) -> asyncio.BufferedProtocol: ...
    async def listen(self, address: Multiaddr, factory: ProtocolFactory) -> Listener: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything the outside world gives to a host."""

    clock: Clock
    wall_clock: WallClock
    randomness: Randomness
    transports: tuple[Transport, ...]
    storage: Storage
