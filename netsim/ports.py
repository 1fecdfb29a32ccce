"""What one simulated machine gives to the software on it: clocks, randomness, storage, and how the machine feels.

Owns what a killed process must lose: after `detach` its storage does nothing any more, whatever is still tried (the fabric
does the same for its connections). The disk outlives processes; what a power cut leaves on it is what was synced. Knows no
peers and no world.
"""

from __future__ import annotations

import random  # noqa: TID251 - a seeded generator, never the global one
from collections.abc import Callable
from dataclasses import dataclass

from peerd.store import StateError

EPOCH_S = 1.8e9
"""Unix seconds at which virtual time 0 lies."""
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


@dataclass(slots=True)
class Condition:
    """How a machine feels: changed by faults, read by whatever runs on it."""

    slow_factor: float = 1.0
    """Device jobs take so many times as long."""
    is_memory_full: bool = False
    lie: str = ""
    """How this peer lies, in its kind's own words; empty for an honest one."""


class SimClock:
    """Virtual seconds, rising."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now


class SimWallClock:
    """A host's own idea of Unix time: wrong by ``skew_s``, which faults may step."""

    def __init__(self, now: Callable[[], float], skew_s: float = 0.0) -> None:
        self._now = now
        self.skew_s = skew_s

    def now_s(self) -> float:
        return EPOCH_S + self._now() + self.skew_s


class SimRandomness:
    """`overlay.ports.Randomness` of one incarnation of one host."""

    def __init__(self, seed: str) -> None:
        self._generator = random.Random(seed)

    def token(self, length: int) -> bytes:
        return self._generator.randbytes(length)

    def uniform(self, low: float, high: float) -> float:
        return self._generator.uniform(low, high)

    def below(self, bound: int) -> int:
        return self._generator.randrange(bound)


class Disk:
    """What a machine keeps when its processes die.

    A disk with ``flush_s`` acknowledges a sync before it is true, as cheap drives do: a power cut loses what was saved
    within that time. Others lose nothing.
    """

    def __init__(self, now: Callable[[], float], flush_s: float = 0.0) -> None:
        self._now = now
        self._flush_s = flush_s
        self._platter: dict[str, bytes] = {}
        self._cache: dict[str, tuple[float, bytes]] = {}
        self.is_full = False
        self.number = 1
        """How many disks this machine has had: a wiped one is another."""

    def read(self, name: str) -> bytes | None:
        cached = self._cache.get(name)
        return self._platter.get(name) if cached is None else cached[1]

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, atomically. Raises OSError when the disk is full."""
        if self.is_full:
            raise OSError("No space left on device")
        if not self._flush_s:
            self._platter[name] = data
            return
        self._flush()
        self._cache[name] = (self._now(), data)

    def power_cut(self) -> None:
        """What wasn't on the platter is gone."""
        self._flush()
        self._cache.clear()

    def wipe(self) -> None:
        """Another disk, an empty one."""
        self.number += 1
        self._platter.clear()
        self._cache.clear()

    def _flush(self) -> None:
        due = self._now() - self._flush_s
        for name in [name for name, (saved_at, _) in self._cache.items() if saved_at <= due]:
            self._platter[name] = self._cache.pop(name)[1]


class SimStorage:
    """`overlay.ports.Storage` of one incarnation; raises what the daemon's own storage raises."""

    def __init__(self, disk: Disk) -> None:
        self._disk: Disk | None = disk

    def detach(self) -> None:
        """The process is dead: nothing it does from here on is kept."""
        self._disk = None

    def load(self, name: str) -> bytes | None:
        _check_name(name)
        return None if self._disk is None else self._disk.read(name)

    def save(self, name: str, data: bytes) -> None:
        """Atomic and synced. Raises StateError when the disk is full."""
        _check_name(name)
        if self._disk is None:
            return
        try:
            self._disk.write(name, bytes(data))
        except OSError as error:
            raise StateError(f"Can't write {name} ({error}); free some disk space.") from error


def _check_name(name: str) -> None:
    if not name or not set(name) <= _NAME_CHARACTERS or name.startswith("."):
        raise ValueError(f"not a state file's name: {name!r}")
