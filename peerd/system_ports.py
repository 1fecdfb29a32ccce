"""The real world's answers to `overlay.ports`: the monotonic clock, the wall clock, the kernel's randomness.

The only file of the daemon that reads a clock or draws randomness; everything below is handed these. The simulator
hands over others.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - the front door
import secrets
import time


class LoopClock:
    """Monotonic seconds of the running event loop, so that virtual time needs no second clock."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()


class SystemWallClock:
    """Unix seconds; only ever used to order one publisher's own records and to print times."""

    def now_s(self) -> float:
        return time.time()  # noqa: TID251 - the front door


class SystemRandomness:
    """Unpredictable bytes and numbers."""

    def __init__(self) -> None:
        self._generator = random.SystemRandom()

    def token(self, length: int) -> bytes:
        return secrets.token_bytes(length)

    def uniform(self, low: float, high: float) -> float:
        return self._generator.uniform(low, high)

    def below(self, bound: int) -> int:
        return self._generator.randrange(bound)
