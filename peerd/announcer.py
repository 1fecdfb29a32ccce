"""Says in the DHT what this node serves: one record per model, on change and kept alive, withdrawn at the end.

A shell over `Dht.publish`: owns which keys a record stands under and the limits on how often it changes: states at once, measured
figures when they differ by enough to matter to a route, and seldom enough for the holders' own limits on stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from blocks.model.identity import Manifest
from overlay.dht.node import Dht
from overlay.host import Host
from overlay.identity import PeerId
from overlay.ports import Clock
from peerd.manifest_record import encode_manifest
from peerd.swarm import Swarm
from routing.records import MANIFESTS_KEY, NEIGHBOURS_MAX, SpanRecord, State, span_keys
from routing.types import ModelId

SPAN_TTL_S = 60.0
MANIFEST_TTL_S = 600.0
CHANGE_S_MIN = 1.0
"""Between two records that differ in figures only; states are told at once."""
SAMPLE_S = 1.0
FIGURES_S_MIN = 5.0
FIGURES_S_PER_KEY = 2.0
"""A holder takes 100 stores a minute from one publisher, whatever they are about."""
SMOOTHING = 0.2
MATTERS_SHARE = 0.25
MATTERS_S = 0.005

Measure = Callable[[SpanRecord], SpanRecord]
"""A record with the figures of this moment."""


class Announcer:
    """See the module."""

    def __init__(self, host: Host, dht: Dht, swarm: Swarm, clock: Clock) -> None:
        self._host = host
        self._dht = dht
        self._swarm = swarm
        self._clock = clock
        self._records: dict[ModelId, SpanRecord] = {}
        self._told_at: dict[ModelId, float] = {}
        self._blocks: dict[ModelId, int] = {}
        self._queue_s: dict[ModelId, float] = {}
        self._stale: list[tuple[bytes, bytes]] = []

    def announce(self, record: SpanRecord, blocks: int) -> None:
        """Publish ``record`` of a model with ``blocks`` blocks, unless it only differs in figures and came too soon."""
        known = self._records.get(record.model)
        now = self._clock.now()
        changed = known is None or _claim_of(known) != _claim_of(record)
        if not changed and now - self._told_at.get(record.model, 0.0) < CHANGE_S_MIN:
            return
        if known is not None and known.span != record.span:
            stale = set(span_keys(record.model, known.span)) - set(span_keys(record.model, record.span))
            self._stale += [(key, bytes(record.model)) for key in sorted(stale)]
        self._blocks[record.model] = blocks
        self._told_at[record.model] = now
        self._tell(record)

    def _tell(self, record: SpanRecord) -> None:
        self._records[record.model] = record
        self._swarm.put_own(record, self._blocks[record.model])
        value = record.encode()
        for key in span_keys(record.model, record.span):
            self._dht.publish(key, bytes(record.model), value, SPAN_TTL_S)

    async def keep_told(self, measure: Measure) -> None:
        """Follow the figures of what is online, for ever."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            for record in list(self._records.values()):
                self.follow(measure(record))

    def follow(self, measured: SpanRecord) -> None:
        """Take a sample of a model's figures, and tell them if they matter and it is time."""
        told = self._records[measured.model]
        if told.state is not State.ONLINE:
            return
        model = told.model
        before = self._queue_s.get(model, told.queue_s)
        self._queue_s[model] = queue_s = before + SMOOTHING * (measured.queue_s - before)
        figures = replace(measured, queue_s=queue_s, neighbour_rtts=self._neighbours(model))
        every_s = max(FIGURES_S_MIN, FIGURES_S_PER_KEY * len(span_keys(model, told.span)))
        if self._clock.now() - self._told_at[model] >= every_s and _matters(told, figures):
            self.announce(figures, self._blocks[model])

    def _neighbours(self, model: ModelId) -> tuple[tuple[bytes, float], ...]:
        """Round trips to other servers of the model, as far as this node was connected to them lately; the nearest first."""
        measured = [
            (rtt_s, server.peer)
            for server in self._swarm.view(model).servers
            if (rtt_s := self._host.rtt_s(PeerId.from_bytes(server.peer))) is not None
        ]
        return tuple((peer, rtt_s) for rtt_s, peer in sorted(measured)[:NEIGHBOURS_MAX])

    def announce_manifest(self, manifest: Manifest) -> None:
        """Publish what drivers need to know of a model."""
        value = encode_manifest(manifest)
        self._swarm.put_own_manifest(manifest)
        self._dht.publish(MANIFESTS_KEY, bytes(manifest.model), value, MANIFEST_TTL_S)

    async def withdraw_stale(self) -> None:
        """Take back what stands under keys that a span no longer touches."""
        stale, self._stale = self._stale, []
        await asyncio.gather(*(self._dht.withdraw(key, subkey) for key, subkey in stale))

    def drain(self) -> None:
        """Say of everything that it is leaving."""
        for record in list(self._records.values()):
            self._tell(replace(record, state=State.DRAINING))

    async def withdraw(self) -> None:
        """Take everything back."""
        withdrawals = [
            self._dht.withdraw(key, bytes(record.model))
            for record in self._records.values()
            for key in span_keys(record.model, record.span)
        ]
        manifests = [self._dht.withdraw(MANIFESTS_KEY, bytes(model)) for model in self._records]
        for model in list(self._records):
            self._swarm.remove_own(model)
        self._records.clear()
        await asyncio.gather(*withdrawals, *manifests)


def _claim_of(record: SpanRecord) -> object:
    """What others must know at once."""
    return record.state, record.span, record.compute_class, record.addresses


def _matters(told: SpanRecord, now: SpanRecord) -> bool:
    """Whether routes could be chosen differently by these figures."""
    seconds = zip((told.queue_s, told.step_s), (now.queue_s, now.step_s), strict=True)
    room_before, room_now = told.free_tokens or 0, now.free_tokens or 0
    known = {peer for peer, _ in told.neighbour_rtts}
    return (
        any(abs(new - old) > max(MATTERS_S, MATTERS_SHARE * old) for old, new in seconds)
        or abs(room_now - room_before) > MATTERS_SHARE * max(room_before, 1)
        or any(peer not in known for peer, _ in now.neighbour_rtts)
    )
