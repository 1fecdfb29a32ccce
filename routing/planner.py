"""The route of a session: least expected time per token over (block, server). Pure.

Dynamic programming over (block done, at whom), block by block: spans may be entered and left midway, links cost what was measured,
and near ties are broken by a number from outside, so that a hundred clients don't pick the same chain. Exact for the costs given;
a server is compared only with those that could still be cheaper to come from, so that hundreds of servers plan in milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from routing.catalog import ModelView, runs
from routing.costs import AVOIDED_PENALTY_S, Costs
from routing.errors import BlocksPending, BlocksUnserved
from routing.health import Health
from routing.records import SpanRecord, State
from routing.types import ComputeClass, Hop, Route, Span

NEAR_TIE = 0.05
"""Costs are spread by up to this share, by (salt, server)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks for a route through what; ``span`` None: all blocks."""

    driver: bytes
    compute_class: ComputeClass
    avoid: tuple[bytes, ...] = ()
    tokens: int = 0
    salt: bytes = b""
    span: Span | None = None


def plan_route(view: ModelView, name: str, question: Question, costs: Costs, health: Health, now: float) -> Route:
    """The best route now.

    Raises:
        BlocksUnserved: nobody serves or loads some blocks.
        BlocksPending: their servers are joining, draining or to be avoided.
    """
    usable = [
        server
        for server in view.servers
        if server.state is State.ONLINE
        and server.compute_class == question.compute_class
        and server.peer not in question.avoid
    ]
    span = question.span or Span(0, view.blocks)
    path = _cheapest(span, usable, question, costs, health, now)
    if path is None:
        raise _no_route(view, name, usable, question)
    return Route(tuple(Hop(server.peer, server.addresses, span) for server, span in path))


def _no_route(
    view: ModelView, name: str, usable: Sequence[SpanRecord], question: Question
) -> BlocksPending | BlocksUnserved:
    def uncovered(servers: Sequence[SpanRecord]) -> tuple[Span, ...]:
        return runs(
            tuple(block in span and not any(block in server.span for server in servers) for block in range(view.blocks))
        )

    span = question.span or Span(0, view.blocks)
    same_class = [server for server in view.servers if server.compute_class == question.compute_class]
    nobody = uncovered(same_class)
    return BlocksUnserved(name, nobody) if nobody else BlocksPending(name, uncovered(usable))


@dataclass(slots=True)
class _Reach:
    """The cheapest way to have just done a block at a server: what it costs, where this hop began, and the hop before."""

    cost: float
    server: SpanRecord
    start: int
    before: _Reach | None


def _cheapest(
    span: Span, servers: Sequence[SpanRecord], question: Question, costs: Costs, health: Health, now: float
) -> list[tuple[SpanRecord, Span]] | None:
    prices = _Prices(servers, question, costs, health, now)
    reached: list[_Reach] = []
    for block in range(span.start, span.end):
        reached = _advance(block, reached, [server for server in servers if block in server.span], prices)
        if not reached:
            return None
    if not reached:
        return None
    last = min(
        reached, key=lambda reach: (reach.cost + costs.hop_s(reach.server.peer, question.driver), reach.server.peer)
    )
    return _walk_back(last, span.end)


class _Prices:
    """What entering a server and each of its blocks costs in this plan."""

    def __init__(
        self, servers: Sequence[SpanRecord], question: Question, costs: Costs, health: Health, now: float
    ) -> None:
        self._driver, self._costs, self._health, self._now = question.driver, costs, health, now
        self.least_link_s = costs.least_link_s
        self.block: dict[bytes, float] = {}
        self.entry: dict[bytes, float] = {}
        for server in servers:
            spread = 1 + NEAR_TIE * _fraction(question.salt, server.peer)
            self.block[server.peer] = costs.block_s(server) * spread
            avoided = AVOIDED_PENALTY_S if health.is_avoided(server.peer, now) else 0.0
            self.entry[server.peer] = costs.entry_s(server) * spread + avoided

    def link(self, before: _Reach | None, server: SpanRecord) -> float:
        """From where the session is (None: the driver) to a server."""
        at = self._driver if before is None else before.server.peer
        avoided = AVOIDED_PENALTY_S if self._health.is_edge_avoided(at, server.peer, self._now) else 0.0
        return self._costs.hop_s(at, server.peer) + avoided


def _advance(block: int, reached: list[_Reach], servers: Sequence[SpanRecord], prices: _Prices) -> list[_Reach]:
    """From the ends of block - 1 (cheapest first) to the ends of ``block``, cheapest first."""
    staying = {reach.server.peer: reach for reach in reached}
    advanced = []
    for server in servers:
        peer = server.peer
        best: _Reach | None = None
        if (stay := staying.get(peer)) is not None:
            best = _Reach(stay.cost + prices.block[peer], server, stay.start, stay.before)
        entry = prices.entry[peer] + prices.block[peer]
        for before in reached or (None,):
            so_far = (0.0 if before is None else before.cost) + entry
            if best is not None and so_far + prices.least_link_s >= best.cost:
                break  # the others are dearer still
            if before is not None and before.server.peer == peer:
                continue
            cost = so_far + prices.link(before, server)
            if best is None or cost < best.cost:
                best = _Reach(cost, server, block, before)
        if best is not None:
            advanced.append(best)
    return sorted(advanced, key=lambda reach: (reach.cost, reach.server.peer))


def _walk_back(last: _Reach, end: int) -> list[tuple[SpanRecord, Span]]:
    path: list[tuple[SpanRecord, Span]] = []
    reach: _Reach | None = last
    while reach is not None:
        path.append((reach.server, Span(reach.start, end)))
        end, reach = reach.start, reach.before
    return path[::-1]


def _fraction(salt: bytes, peer: bytes) -> float:
    return int.from_bytes(hashlib.sha256(salt + peer).digest()[:4], "big") / 2**32
