"""Which server computes the next micro-batch: interleaved weighted round robin by measured throughput (SWARM, ICML 2023). Pure.

Each server has an account of expected busy seconds; the least gets the work and is charged for it, so that servers get work in proportion
to their speed, however fine the pieces. Decides nothing of results: which server computes a micro-batch changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from routing.costs import DEFAULT_STEP_S
from routing.records import SpanRecord

AVERAGE_SHARE = 0.3
"""What the latest measurement counts in the moving average."""
SERVERS_REMEMBERED = 4096


class Spread:
    """Accounts of one model's servers."""

    def __init__(self) -> None:
        self._busy_s: dict[bytes, float] = {}
        self._level_s: dict[int, float] = {}  # by first block: what the last who was chosen for it had
        self._rate: dict[bytes, float] = {}

    def choose(self, servers: Sequence[SpanRecord], block: int, end: int, tokens: int) -> SpanRecord:
        """The server, among ``servers`` that all have ``block``, to take ``tokens`` from there as far as it goes, and charge it."""
        known = (self._busy_s[server.peer] for server in servers if server.peer in self._busy_s)
        level = max(self._level_s.get(block, 0.0), min(known, default=0.0))
        for server in servers:  # newcomers, and who was away, enter at the others' level: tried soon, and not flooded
            self._busy_s[server.peer] = max(level, self._busy_s.get(server.peer, level))
        chosen = min(servers, key=lambda server: (self._busy_s[server.peer], -min(end, server.span.end), server.peer))
        self._level_s[block] = self._busy_s[chosen.peer]
        blocks = min(end, chosen.span.end) - block
        self._busy_s[chosen.peer] += tokens * blocks / self.rate(chosen)
        while len(self._busy_s) > SERVERS_REMEMBERED:
            gone = next(iter(self._busy_s))
            del self._busy_s[gone]
            self._rate.pop(gone, None)
        return chosen

    def rate(self, server: SpanRecord) -> float:
        """Tokens x blocks per second: as measured, else as announced."""
        return self._rate.get(server.peer) or 1.0 / (server.prefill_s or server.step_s or DEFAULT_STEP_S)

    def took(self, server: SpanRecord, tokens: int, blocks: int, seconds: float) -> None:
        """A call's measurement."""
        measured = tokens * blocks / max(seconds, 1e-6)
        known = self._rate.get(server.peer)
        self._rate[server.peer] = measured if known is None else known + AVERAGE_SHARE * (measured - known)
