"""A planner of tensor calls that is told who serves what. Torch-free, for real time and for virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from blocks.protocol.call_errors import CallFault
from overlay.errors import PeerdError
from routing.catalog import ModelView
from routing.health import Fault, Health
from routing.records import SpanRecord
from routing.types import ComputeClass, ModelId, Route, Span


@dataclass
class Swarm:
    """`peerd.calls.caller.CallPlanner` over a list of records."""

    blocks: int
    records: list[SpanRecord] = field(default_factory=list)
    health: Health = field(default_factory=Health)
    blamed: list[tuple[bytes, str]] = field(default_factory=list)

    def view(self, model: ModelId) -> ModelView:
        return ModelView(model, self.blocks, tuple(self.records))

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        wanted = span or Span(0, self.blocks)
        for block in range(wanted.start, wanted.end):
            if not any(block in record.span for record in self.records):
                raise CallFault("unsupported", f"nobody serves block {block}")
        return Route(())

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        self.blamed.append((peer, error.code))
        self.health.blame(peer, Fault.UNREACHABLE, asyncio.get_running_loop().time())

    def praise(self, peers: Sequence[bytes]) -> None:
        """Nothing is held against anybody here."""

    async def wait_changed(self, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, 0.02))
