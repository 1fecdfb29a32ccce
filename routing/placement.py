"""Which blocks a server takes: max-min of throughput, claims of those who are still loading counted. Pure.

How many is sizing's answer. A server that is online stays where it is in this version.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from routing.catalog import ModelView
from routing.costs import DEFAULT_STEP_S
from routing.records import SpanRecord, State
from routing.types import ComputeClass, Span


def block_throughputs(view: ModelView, compute_class: ComputeClass | None, without: bytes = b"") -> list[float]:
    """Tokens/s that each block's servers (online or joining) could do together."""
    rates = [0.0] * view.blocks
    for server in view.servers:
        if server.peer != without:
            _add(rates, server, compute_class)
    return rates


def _add(rates: list[float], server: SpanRecord, compute_class: ComputeClass | None) -> None:
    if compute_class in (None, server.compute_class) and server.state is not State.DRAINING:
        rate = _rate(server)
        for block in range(server.span.start, min(server.span.end, len(rates))):
            rates[block] += rate


def _rate(server: SpanRecord) -> float:
    return 1.0 / ((server.step_s or DEFAULT_STEP_S) * len(server.span))


def choose_span(view: ModelView, blocks: int, compute_class: ComputeClass | None, own: bytes = b"") -> Span:
    """Where ``blocks`` blocks help most: the weakest blocks first, then the least total cover, then the lowest start.

    A server that can hold everything takes everything.
    """
    return _weakest(block_throughputs(view, compute_class, own), blocks)


def _weakest(rates: list[float], blocks: int) -> Span:
    blocks = max(1, min(blocks, len(rates)))
    starts = range(len(rates) - blocks + 1)
    best = min(starts, key=lambda start: (sorted(rates[start : start + blocks]), start))
    return Span(best, best + blocks)


def settle_claim(
    view: ModelView, before: Collection[bytes], own: bytes, blocks: int, compute_class: ComputeClass | None
) -> Span:
    """Where to go once the claims that others made at the moment of ours are known, so that newcomers don't herd to one gap.

    Peers in ``before`` were seen ahead of our own claim: theirs stand. Claims of the same moment are settled in the order of
    peer ids, each going where it helps most given those before it, as its owner, who sees the same, does too.
    """
    rivals = {s.peer: s for s in view.servers if s.state is State.JOINING and s.peer not in before and s.peer != own}
    standing = [server for server in view.servers if server.peer not in rivals and server.peer != own]
    rates: dict[ComputeClass | None, list[float]] = {}  # of each class, as it is asked for

    def choose(count: int, wanted: ComputeClass | None) -> Span:
        if wanted not in rates:
            rates[wanted] = block_throughputs(replace(view, servers=tuple(standing)), wanted)
        return _weakest(rates[wanted], count)

    for rival in sorted(rivals.values(), key=lambda server: server.peer):
        if rival.peer < own:
            settled = replace(rival, span=choose(len(rival.span), rival.compute_class))
            standing.append(settled)
            for known, found in rates.items():
                _add(found, settled, known)
    return choose(blocks, compute_class)
