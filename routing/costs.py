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
    least_link_s: float = 0.0
    """No two peers are nearer than this: lets a plan stop looking early."""

    def block_s(self, server: SpanRecord) -> float:
        """One token through one block of a server."""
        return server.step_s or DEFAULT_STEP_S

    def entry_s(self, server: SpanRecord) -> float:
        """What every visit to a server costs besides: its queue, and lack of room."""
        room = server.free_tokens
        crowded = CROWDED_PENALTY_S if room is not None and room < max(self.tokens, CROWDED_TOKENS) else 0.0
        return server.queue_s + crowded

    def span_s(self, server: SpanRecord, span: Span) -> float:
        """One token through ``span`` of a server."""
        return self.entry_s(server) + self.block_s(server) * len(span)

    def hop_s(self, sender: bytes, receiver: bytes) -> float:
        """One way between two peers; a node is near itself."""
        if sender == receiver:
            return 0.0
        measured = self.link_s(sender, receiver)
        return DEFAULT_LINK_S if measured is None else measured


def least_link_s(servers: tuple[SpanRecord, ...], own: bytes, measured: Callable[[bytes], float | None]) -> float:
    """The nearest that any two of ``servers`` are, as `link_table` prices them."""
    told = [rtt for server in servers for _, rtt in server.neighbour_rtts]
    here = any(server.peer == own for server in servers)
    ours = [measured(server.peer) for server in servers if server.peer != own] if here else []
    return min([DEFAULT_LINK_S, *(rtt / 2 for rtt in [*told, *ours] if rtt is not None)])


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
