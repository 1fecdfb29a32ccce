"""Our index of live records: who serves which blocks of what. Pure.

Records come verified from the DHT; one that names another peer than its publisher is refused here. A snapshot is immutable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from routing.errors import BadRecord
from routing.records import SpanRecord, State, decode_record
from routing.types import ComputeClass, ModelId, Span

SERVERS_PER_MODEL_MAX = 4096


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model's servers at one moment, in order of (start, peer)."""

    model: ModelId
    blocks: int
    servers: tuple[SpanRecord, ...]

    def replicas(self, *states: State, compute_class: ComputeClass | None = None) -> tuple[int, ...]:
        """For each block how many servers in one of ``states`` (default: online) there are."""
        wanted = states or (State.ONLINE,)
        counts = [0] * self.blocks
        for server in self.servers:
            if server.state in wanted and compute_class in (None, server.compute_class):
                for block in range(server.span.start, min(server.span.end, self.blocks)):
                    counts[block] += 1
        return tuple(counts)

    def missing(self, *states: State) -> tuple[Span, ...]:
        """The runs of blocks that nobody in one of ``states`` serves."""
        return runs(tuple(count == 0 for count in self.replicas(*states)))

    @property
    def need(self) -> float:
        """How badly the model wants servers: blocks without any weigh most, then the thinnest cover."""
        counts = self.replicas(State.ONLINE, State.JOINING)
        uncovered = sum(1 for count in counts if count == 0)
        return uncovered * 1000 + 1 / (1 + min(counts, default=0))


def runs(flags: tuple[bool, ...]) -> tuple[Span, ...]:
    """Maximal runs of true flags, as spans."""
    spans: list[Span] = []
    start: int | None = None
    for index, flag in enumerate((*flags, False)):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            spans.append(Span(start, index))
            start = None
    return tuple(spans)


class Catalog:
    """The newest record of every server and model."""

    def __init__(self) -> None:
        self._records: dict[ModelId, dict[bytes, tuple[SpanRecord, float]]] = {}

    def replace(self, model: ModelId, found: Iterable[tuple[bytes, bytes, float]], now: float) -> int:
        """Take what a lookup of one model brought: (publisher, value, seconds left). Returns how many were refused."""
        refused = 0
        fresh: dict[bytes, tuple[SpanRecord, float]] = {}
        for publisher, value, left_s in found:
            try:
                record = decode_record(value)
            except BadRecord:
                refused += 1
                continue
            if record.peer != publisher or record.model != model or len(fresh) >= SERVERS_PER_MODEL_MAX:
                refused += 1
                continue
            fresh[publisher] = (record, now + left_s)
        self._records[model] = fresh
        return refused

    def put(self, record: SpanRecord, until: float) -> None:
        """Take one record at once (our own)."""
        self._records.setdefault(record.model, {})[record.peer] = (record, until)

    def remove(self, model: ModelId, peer: bytes) -> None:
        self._records.get(model, {}).pop(peer, None)

    def view(self, model: ModelId, blocks: int, now: float) -> ModelView:
        """A snapshot of one model."""
        live = [record for record, until in self._records.get(model, {}).values() if until > now]
        fitting = [record for record in live if record.span.end <= blocks]
        return ModelView(model, blocks, tuple(sorted(fitting, key=lambda found: (found.span, found.peer))))

    def models(self) -> tuple[ModelId, ...]:
        return tuple(sorted(self._records))


def neediest(views: Mapping[ModelId, ModelView]) -> ModelId | None:
    """The model that a newcomer should serve: greatest need, ties by id."""
    ordered = sorted(views.items(), key=lambda item: (-item[1].need, item[0]))
    return ordered[0][0] if ordered else None
