"""Says in the DHT what this node serves: one record per model, on change and kept alive, withdrawn at the end.

A shell over `Dht.publish`: owns which keys a record stands under and the limit on how often it changes.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgpack

from blocks.model.identity import Manifest
from overlay.dht.node import Dht
from overlay.host import Host
from overlay.ports import Clock
from peerd.swarm import Swarm
from routing.records import MANIFESTS_KEY, SpanRecord, State, span_keys
from routing.types import ModelId

SPAN_TTL_S = 60.0
MANIFEST_TTL_S = 600.0
CHANGE_S_MIN = 1.0
"""Measured figures change all the time; states are told at once."""


class Announcer:
    """See the module."""

    def __init__(self, host: Host, dht: Dht, swarm: Swarm, clock: Clock) -> None:
        self._host = host
        self._dht = dht
        self._swarm = swarm
        self._clock = clock
        self._records: dict[ModelId, SpanRecord] = {}
        self._told_at: dict[ModelId, float] = {}
        self._stale: list[tuple[bytes, bytes]] = []

    def announce(self, record: SpanRecord, blocks: int) -> None:
        """Publish ``record`` of a model with ``blocks`` blocks, unless it only differs in figures and came too soon."""
        known = self._records.get(record.model)
        now = self._clock.now()
        changed = known is None or (known.state, known.span) != (record.state, record.span)
        if not changed and now - self._told_at.get(record.model, 0.0) < CHANGE_S_MIN:
            return
        if known is not None and known.span != record.span:
            stale = set(span_keys(record.model, known.span)) - set(span_keys(record.model, record.span))
            self._stale += [(key, bytes(record.model)) for key in sorted(stale)]
        self._records[record.model] = record
        self._told_at[record.model] = now
        self._swarm.put_own(record, blocks)
        for key in span_keys(record.model, record.span):
            self._dht.publish(key, bytes(record.model), record.encode(), SPAN_TTL_S)

    def announce_manifest(self, manifest: Manifest) -> None:
        """Publish what drivers need to know of a model."""
        self._swarm.put_own_manifest(manifest)
        value: bytes = msgpack.packb(manifest.to_document())
        self._dht.publish(MANIFESTS_KEY, bytes(manifest.model), value, MANIFEST_TTL_S)

    async def withdraw_stale(self) -> None:
        """Take back what stands under keys that a span no longer touches."""
        stale, self._stale = self._stale, []
        await asyncio.gather(*(self._dht.withdraw(key, subkey) for key, subkey in stale))

    def drain(self) -> None:
        """Say of everything that it is leaving."""
        for record in list(self._records.values()):
            leaving = replace(record, state=State.DRAINING)
            self._records[record.model] = leaving
            for key in span_keys(record.model, record.span):
                self._dht.publish(key, bytes(record.model), leaving.encode(), SPAN_TTL_S)

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
