"""Who holds how many bytes of KV: admission by honest reservation, and whose lease goes first. Pure.

A lease reserves its session's full length when it opens, so what was admitted can always be computed. Under pressure the
least recently used idle lease is given up: that costs its driver a replay, not an error (DESIGN 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.engine import limits
from blocks.protocol.device import LeaseKey


@dataclass(slots=True)
class _Lease:
    size_bytes: int
    used_at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """``admitted``, with the leases to drop first; or not, and when to ask again."""

    admitted: bool
    dropped: tuple[LeaseKey, ...] = ()
    retry_after_s: float = 0.0


class KvBudget:
    """Bytes of one device."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._leases: dict[LeaseKey, _Lease] = {}
        self._used_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return max(0, self._total_bytes - self._used_bytes)

    def resize(self, total_bytes: int) -> None:
        """Set the budget; leases over it stay until they end."""
        self._total_bytes = total_bytes

    def reserve(self, key: LeaseKey, size_bytes: int, now: float) -> Verdict:
        """Take ``size_bytes`` for ``key`` (which gives up what it held), dropping idle leases if that is enough."""
        self.release(key)
        if size_bytes > self._total_bytes or len(self._leases) >= limits.LEASES_MAX:
            return Verdict(False, (), limits.BUSY_RETRY_S)
        dropped: list[LeaseKey] = []
        missing = size_bytes - self.free_bytes
        for other, lease in self._leases.items():  # in order of last use
            if missing <= 0:
                break
            if now - lease.used_at >= limits.IDLE_LEASE_S:
                dropped.append(other)
                missing -= lease.size_bytes
        if missing > 0:
            return Verdict(False, (), limits.BUSY_RETRY_S)
        for other in dropped:
            self.release(other)
        self._leases[key] = _Lease(size_bytes, now)
        self._used_bytes += size_bytes
        return Verdict(True, tuple(dropped))

    def touch(self, key: LeaseKey, now: float) -> None:
        """``key`` did something."""
        lease = self._leases.pop(key, None)
        if lease is not None:
            lease.used_at = now
            self._leases[key] = lease

    def release(self, key: LeaseKey) -> None:
        """Give back; harmless when nothing is held."""
        lease = self._leases.pop(key, None)
        if lease is not None:
            self._used_bytes -= lease.size_bytes
