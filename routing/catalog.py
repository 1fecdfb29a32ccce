"""Our index of live records: who serves which blocks of what. Pure.

Records come verified from the DHT; one that names another peer than its publisher is refused here. A record's life is counted from
the first time that this very sequence was seen, so that reading it again never makes it older than it is. A lookup that misses a
record doesn't end it: gaps of the DHT look like gaps of the swarm, and servers that believe them stampede (a known fault of Petals).
A snapshot is immutable, and the same one until something of its model changes or expires: with a thousand servers it is asked for
far more often than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from routing.errors import BadRecord
from routing.records import SpanRecord, State, decode_record
from routing.types import ComputeClass, ModelId, Span

SERVERS_PER_MODEL_MAX = 4096
MISSES_TO_FORGET = 2
"""Lookups in a row without a record, after which it is taken as withdrawn though its time isn't over."""


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


@dataclass(frozen=True, slots=True)
class Sighting:
    """One value under a key of the model, as the DHT gave it."""

    publisher: bytes
    sequence: int
    ttl_s: float
    value: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    record: SpanRecord
    sequence: int
    until: float
    misses: int = 0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A view, and the moments from ``since`` until before ``until`` that it is right for."""

    view: ModelView
    since: float
    until: float

    def holds(self, blocks: int, now: float) -> bool:
        return self.view.blocks == blocks and self.since <= now < self.until


class Catalog:
    """The newest record of every server and model."""

    def __init__(self) -> None:
        self._entries: dict[ModelId, dict[bytes, _Entry]] = {}
        self._own: dict[ModelId, SpanRecord] = {}
        self._snapshots: dict[ModelId, _Snapshot] = {}
        """Of models with records only."""

    def replace(self, model: ModelId, found: Iterable[Sighting], now: float) -> int:
        """Take what one lookup of all keys of a model brought. Returns how many sightings were refused."""
        known = self._entries.get(model, {})
        newest: dict[bytes, Sighting] = {}
        for sighting in found:
            before = newest.get(sighting.publisher)
            if before is None or sighting.sequence > before.sequence:
                newest[sighting.publisher] = sighting
        refused = 0
        fresh: dict[bytes, _Entry] = {}
        for publisher in sorted(newest):
            if len(fresh) >= SERVERS_PER_MODEL_MAX:
                refused += 1
                continue
            entry = _entry_of(newest[publisher], model, known.get(publisher), now)
            if entry is None:
                refused += 1
            else:
                fresh[publisher] = entry
        for publisher, entry in known.items():
            if publisher not in newest and entry.misses + 1 < MISSES_TO_FORGET and len(fresh) < SERVERS_PER_MODEL_MAX:
                fresh[publisher] = replace(entry, misses=entry.misses + 1)
        if fresh != known:
            self._snapshots.pop(model, None)
        self._entries[model] = fresh
        return refused

    def forget_others_than(self, models: Iterable[ModelId]) -> None:
        """Drop models that nobody announces any more; our own records stay."""
        kept = set(models)
        self._entries = {model: entries for model, entries in self._entries.items() if model in kept}
        self._snapshots = {model: snapshot for model, snapshot in self._snapshots.items() if model in kept}

    def doubt(self, peer: bytes) -> bool:
        """``peer`` hung up: the next lookup that misses it is enough to forget it. Returns whether it serves anything."""
        found = False
        for entries in self._entries.values():
            if (entry := entries.get(peer)) is not None:
                entries[peer] = replace(entry, misses=MISSES_TO_FORGET - 1)
                found = True
        return found

    def put_own(self, record: SpanRecord) -> None:
        """Our own record: it counts at once, whatever lookups still bring of it."""
        self._own[record.model] = record
        self._snapshots.pop(record.model, None)

    def remove_own(self, model: ModelId) -> None:
        """Our own record goes at once, with what lookups brought of it."""
        own = self._own.pop(model, None)
        if own is not None:
            self._entries.get(model, {}).pop(own.peer, None)
            self._snapshots.pop(model, None)

    def view(self, model: ModelId, blocks: int, now: float) -> ModelView:
        """A snapshot of one model."""
        snapshot = self._snapshots.get(model)
        if snapshot is None or not snapshot.holds(blocks, now):
            snapshot = self._look(model, blocks, now)
            if model in self._entries or model in self._own:
                self._snapshots[model] = snapshot
        return snapshot.view

    def _look(self, model: ModelId, blocks: int, now: float) -> _Snapshot:
        entries = {peer: entry for peer, entry in self._entries.get(model, {}).items() if entry.until > now}
        live = {peer: entry.record for peer, entry in entries.items()}
        if (own := self._own.get(model)) is not None:
            live[own.peer] = own
        fitting = [record for record in live.values() if record.span.end <= blocks]
        view = ModelView(
            model, blocks, tuple(sorted(fitting, key=lambda found: (found.span.start, found.span.end, found.peer)))
        )
        return _Snapshot(view, now, min((entry.until for entry in entries.values()), default=float("inf")))


def _entry_of(sighting: Sighting, model: ModelId, known: _Entry | None, now: float) -> _Entry | None:
    """None for a record that can't be read, or that isn't about its publisher and this model."""
    if known is not None and sighting.sequence <= known.sequence:
        return replace(known, misses=0) if known.misses else known
    try:
        record = decode_record(sighting.value)
    except BadRecord:
        return None
    if record.peer != sighting.publisher or record.model != model:
        return None
    return _Entry(record, sighting.sequence, now + sighting.ttl_s)


def neediest(views: Mapping[ModelId, ModelView]) -> ModelId | None:
    """The model that a newcomer should serve: greatest need, ties by id."""
    ordered = sorted(views.items(), key=lambda item: (-item[1].need, item[0]))
    return ordered[0][0] if ordered else None
