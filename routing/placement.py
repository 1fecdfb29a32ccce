"""Which blocks a server takes: max-min of throughput, claims of those who are still loading counted. Pure.

How many is sizing's answer. Moving is rare: only when several observations in a row agree, the gain pays for the load, and no gap
opens (facts: greedy rebalancing herds and oscillates without these).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routing.catalog import ModelView
from routing.costs import DEFAULT_STEP_S
from routing.records import SpanRecord, State
from routing.types import ComputeClass, Span

AGREEING_OBSERVATIONS = 5
GAIN_AT_LEAST = 1.2


def block_throughputs(view: ModelView, compute_class: ComputeClass | None, without: bytes = b"") -> list[float]:
    """Tokens/s that each block's servers (online or joining) could do together."""
    rates = [0.0] * view.blocks
    for server in view.servers:
        fits = compute_class in (None, server.compute_class) and server.state is not State.DRAINING
        if fits and server.peer != without:
            rate = _rate(server)
            for block in range(server.span.start, min(server.span.end, view.blocks)):
                rates[block] += rate
    return rates


def _rate(server: SpanRecord) -> float:
    return 1.0 / ((server.step_s or DEFAULT_STEP_S) * len(server.span))


def choose_span(view: ModelView, blocks: int, compute_class: ComputeClass | None, own: bytes = b"") -> Span:
    """Where ``blocks`` blocks help most: the weakest blocks first, then the least total cover, then the lowest start.

    A server that can hold everything takes everything.
    """
    blocks = max(1, min(blocks, view.blocks))
    rates = block_throughputs(view, compute_class, own)
    starts = range(view.blocks - blocks + 1)
    best = min(starts, key=lambda start: (sorted(rates[start : start + blocks]), start))
    return Span(best, best + blocks)


@dataclass(slots=True)
class MoveObserver:
    """Remembers how often in a row moving looked better."""

    agreed: int = 0
    wanted: Span | None = None

    def observe(
        self, view: ModelView, own: SpanRecord, seconds_to_load: float, horizon_s: float = 3600.0
    ) -> Span | None:
        """The span to move to, or None for now."""
        better = _better_span(view, own, seconds_to_load, horizon_s)
        if better is None or better != self.wanted:
            self.wanted, self.agreed = better, 1 if better is not None else 0
            return None
        self.agreed += 1
        return better if self.agreed >= AGREEING_OBSERVATIONS else None


def _better_span(view: ModelView, own: SpanRecord, seconds_to_load: float, horizon_s: float) -> Span | None:
    without = block_throughputs(view, own.compute_class, own.peer)
    if any(without[block] == 0.0 for block in range(own.span.start, own.span.end)):
        return None  # leaving would open a gap
    rate = _rate(own)
    now = min(_with(without, own.span, rate))
    target = choose_span(view, len(own.span), own.compute_class, own.peer)
    after = min(_with(without, target, rate))
    pays = (after - now) * (horizon_s - seconds_to_load) > 0
    return target if target != own.span and pays and after >= now * GAIN_AT_LEAST else None


def _with(rates: Sequence[float], span: Span, rate: float) -> list[float]:
    return [value + (rate if block in span else 0.0) for block, value in enumerate(rates)]
