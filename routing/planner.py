"""The route of a session: least expected time per token over (block, server). Pure.

Dijkstra's algorithm over vertices (block reached, at whom): spans may be entered and left midway, links cost what was measured, and
near ties are broken by a number from outside, so that a hundred clients don't pick the same chain.
"""

from __future__ import annotations

import hashlib
import heapq
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
    """Who asks for a route through what."""

    driver: bytes
    compute_class: ComputeClass
    avoid: tuple[bytes, ...] = ()
    tokens: int = 0
    salt: bytes = b""


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
    path = _cheapest(view.blocks, usable, question, costs, health, now)
    if path is None:
        raise _no_route(view, name, usable, question)
    return Route(tuple(Hop(server.peer, server.addresses, span) for server, span in path))


def _no_route(
    view: ModelView, name: str, usable: Sequence[SpanRecord], question: Question
) -> BlocksPending | BlocksUnserved:
    def uncovered(servers: Sequence[SpanRecord]) -> tuple[Span, ...]:
        return runs(tuple(not any(block in server.span for server in servers) for block in range(view.blocks)))

    same_class = [server for server in view.servers if server.compute_class == question.compute_class]
    nobody = uncovered(same_class)
    return BlocksUnserved(name, nobody) if nobody else BlocksPending(name, uncovered(usable))


def _cheapest(
    blocks: int, servers: Sequence[SpanRecord], question: Question, costs: Costs, health: Health, now: float
) -> list[tuple[SpanRecord, Span]] | None:
    starts: dict[int, list[SpanRecord]] = {}
    for server in servers:
        for block in range(server.span.start, server.span.end):
            starts.setdefault(block, []).append(server)
    spread = {server.peer: 1 + NEAR_TIE * _fraction(question.salt, server.peer) for server in servers}
    queue: list[tuple[float, int, int, bytes]] = [(0.0, 0, 0, question.driver)]
    best: dict[tuple[int, bytes], float] = {(0, question.driver): 0.0}
    came: dict[tuple[int, bytes], tuple[int, bytes, SpanRecord]] = {}
    while queue:
        cost, hops, block, at = heapq.heappop(queue)
        if cost > best[block, at]:
            continue
        if block == blocks:
            return _walk_back(came, block, at)
        for server in starts.get(block, ()):
            if server.peer == at and block > 0:
                continue  # staying is what a longer span is for
            link = costs.hop_s(at, server.peer)
            if health.is_edge_avoided(at, server.peer, now):
                link += AVOIDED_PENALTY_S
            entry = cost + link + (AVOIDED_PENALTY_S if health.is_avoided(server.peer, now) else 0.0)
            for end in range(block + 1, server.span.end + 1):
                total = entry + costs.span_s(server, Span(block, end)) * spread[server.peer]
                if end == blocks:
                    total += costs.hop_s(server.peer, question.driver)
                vertex = (end, server.peer)
                if total < best.get(vertex, float("inf")):
                    best[vertex] = total
                    came[vertex] = (block, at, server)
                    heapq.heappush(queue, (total, hops + 1, end, server.peer))
    return None


def _walk_back(
    came: dict[tuple[int, bytes], tuple[int, bytes, SpanRecord]], block: int, at: bytes
) -> list[tuple[SpanRecord, Span]]:
    path: list[tuple[SpanRecord, Span]] = []
    while block > 0:
        start, before, server = came[block, at]
        path.append((server, Span(start, block)))
        block, at = start, before
    return path[::-1]


def _fraction(salt: bytes, peer: bytes) -> float:
    return int.from_bytes(hashlib.sha256(salt + peer).digest()[:4], "big") / 2**32
