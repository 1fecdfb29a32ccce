"""What a token costs on a server and between two: seconds, never anything else. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from routing.records import SpanRecord
from routing.types import Span

DEFAULT_LINK_S = 0.05
"""One way, to a peer whose round trip nobody has measured: a typical home."""
DEFAULT_STEP_S = 0.002
CROWDED_TOKENS = 1024
CROWDED_PENALTY_S = 0.5
AVOIDED_PENALTY_S = 5.0

LinkSeconds = Callable[[bytes, bytes], float | None]
"""(from, to) peers to measured one-way seconds, or None."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices servers and links for one plan."""

    link_s: LinkSeconds
    tokens: int = 0

    def span_s(self, server: SpanRecord, span: Span) -> float:
        """One token through ``span`` of a server, its queue and lack of room included."""
        per_block = server.step_s or DEFAULT_STEP_S
        crowded = CROWDED_PENALTY_S if 0 < server.free_tokens < max(self.tokens, CROWDED_TOKENS) else 0.0
        return per_block * len(span) + server.queue_s + crowded

    def hop_s(self, sender: bytes, receiver: bytes) -> float:
        """One way between two peers; a node is near itself."""
        if sender == receiver:
            return 0.0
        measured = self.link_s(sender, receiver)
        return DEFAULT_LINK_S if measured is None else measured


def link_table(servers: tuple[SpanRecord, ...], own: bytes, measured: Callable[[bytes], float | None]) -> LinkSeconds:
    """Links as far as known: from the servers' own records, and from this node's round trips."""
    rtts = {(server.peer, other): rtt for server in servers for other, rtt in server.neighbour_rtts}

    def link_s(sender: bytes, receiver: bytes) -> float | None:
        if own in (sender, receiver):
            rtt = measured(receiver if sender == own else sender)
        else:
            rtt = rtts.get((sender, receiver), rtts.get((receiver, sender)))
        return None if rtt is None else rtt / 2

    return link_s
