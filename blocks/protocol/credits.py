"""How much may be under way in a ring: windows and bytes, the smallest that any hop granted.

Only arithmetic; invariants are checked going in and out, since a credit lost or made up twice stalls a session
or floods a hop.
"""

from __future__ import annotations

from collections.abc import Iterable


class Credits:
    """What the driver may still send. Takes and gives whole windows."""

    __slots__ = ("_bytes_free", "_bytes_granted", "_windows_free", "_windows_granted")

    def __init__(self, windows: int = 0, window_bytes: int = 0) -> None:
        if windows < 0 or window_bytes < 0:
            raise ValueError("credits are never negative")
        self._windows_granted = self._windows_free = windows
        self._bytes_granted = self._bytes_free = window_bytes

    @classmethod
    def smallest(cls, grants: Iterable[tuple[int, int]]) -> Credits:
        """The credits of a ring whose hops granted ``(windows, bytes)`` each."""
        pairs = tuple(grants)
        return cls(min(windows for windows, _ in pairs), min(size for _, size in pairs))

    @property
    def windows_granted(self) -> int:
        return self._windows_granted

    @property
    def bytes_granted(self) -> int:
        return self._bytes_granted

    @property
    def windows_free(self) -> int:
        return self._windows_free

    @property
    def bytes_free(self) -> int:
        return self._bytes_free

    def take(self, size_bytes: int) -> bool:
        """Take one window of ``size_bytes``; False, and nothing taken, when that is more than what is free."""
        if self._windows_free < 1 or self._bytes_free < size_bytes:
            return False
        self._windows_free -= 1
        self._bytes_free -= size_bytes
        return True

    def give(self, size_bytes: int) -> None:
        """Return what one window took."""
        self._windows_free += 1
        self._bytes_free += size_bytes
        if self._windows_free > self._windows_granted or self._bytes_free > self._bytes_granted:
            raise ValueError("more credits came back than were taken")
