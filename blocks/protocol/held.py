"""Windows that came before their `open`: kept for a moment, within bounds by number, bytes and origin.

Their authority can't be checked yet (the route that gives it isn't known), so the bounds are all that stands
between a stranger and our memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.protocol import limits
from blocks.protocol.messages import Epoch, Window
from overlay.rpc.types import Message


@dataclass(frozen=True, slots=True)
class HeldWindow:
    """A window of an epoch that this node hasn't heard of."""

    message: Message
    window: Window
    origin: bytes
    channel: object
    until: float

    @property
    def size_bytes(self) -> int:
        return 0 if self.window.hidden is None else len(self.window.hidden.data)


class HeldWindows:
    """In order of arrival."""

    def __init__(self) -> None:
        self._held: list[HeldWindow] = []

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, held: HeldWindow) -> bool:
        """Keep it; False when that would be over a bound."""
        from_origin = sum(1 for other in self._held if other.origin == held.origin)
        if len(self._held) >= limits.HELD_WINDOWS_MAX or from_origin >= limits.HELD_WINDOWS_PER_ORIGIN_MAX:
            return False
        if held.size_bytes + sum(other.size_bytes for other in self._held) > limits.HELD_BYTES_MAX:
            return False
        self._held.append(held)
        return True

    def take(self, session: bytes, hop_index: int, epoch: Epoch) -> tuple[HeldWindow, ...]:
        """Those that an `open` of ``epoch`` lets in, and forget what it makes stale."""
        mine = [h for h in self._held if h.window.session == session and h.window.hop_index == hop_index]
        self._held = [h for h in self._held if h not in mine or h.window.epoch > epoch]
        return tuple(h for h in mine if h.window.epoch == epoch)

    def take_expired(self, now: float) -> tuple[HeldWindow, ...]:
        expired = tuple(h for h in self._held if h.until <= now)
        if expired:
            self._held = [h for h in self._held if h.until > now]
        return expired
