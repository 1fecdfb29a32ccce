"""Says in the DHT what this node serves: one record per model, on change and kept alive, withdrawn at the end.

A shell over `Dht.publish`: owns which keys a record stands under and the limits on how often it changes: states at once, measured
figures when they differ by enough to matter to a route, and seldom enough for the holders' own limits on stores; round trips to
neighbours alone when the record is about to be renewed anyway.

A model's manifest is kept by a few dozen of its servers, since it is the same at all of them: those that a hash draws. The others
publish theirs too where the network's differs (a manifest counts by how many say it, so that must not get cheaper to outvote), and
where hardly anybody publishes one, whatever the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from blocks.model.identity import Manifest
from overlay.dht.node import Dht
from overlay.errors import LimitExceeded
from overlay.host import Host
from overlay.identity import PeerId
from overlay.ports import Clock
from peerd.manifest_record import encode_manifest
from peerd.swarm import Swarm
from routing.records import MANIFESTS_KEY, NEIGHBOURS_MAX, SpanRecord, State, span_keys
from routing.types import ModelId

log = logging.getLogger(__name__)

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
NEIGHBOURS_S_MIN = 25.0
"""A record of this age is renewed soon, at half its life: new neighbours cost no store of their own then."""
MANIFEST_KEEPERS = 32
"""So many of a model's servers keep its manifest published; who does already goes on up to rank twice that."""
OTHERS_MIN = 8
"""With fewer other publishers than that, a manifest is published by every server: keepers may still be loading, or lie."""
KEEPERS_S = 10.0
DRAWS_CACHED = 16384
CONTESTED_TIMES = 2
"""With more than half as many that say something else, all servers say what they know."""
CONTESTED_S = 3600.0
"""Who saw a manifest that differs goes on publishing so long: once outvoted it is seen no more, and would win again."""

Measure = Callable[[SpanRecord], SpanRecord]
"""A record with the figures of this moment."""


@dataclass(slots=True)
class _OwnManifest:
    manifest: Manifest
    value: bytes
    published: bool = False
    contested_until: float = float("-inf")


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
        self._compared_at: dict[ModelId, float] = {}
        self._manifests: dict[ModelId, _OwnManifest] = {}
        self._judged_at = float("-inf")
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
        """Follow the figures of what is online, and who keeps which manifest, for ever."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            for record in list(self._records.values()):
                self.follow(measure(record))
            self.keep_manifests()

    def follow(self, measured: SpanRecord) -> None:
        """Take a sample of a model's figures, and tell them if they matter and it is time."""
        told = self._records[measured.model]
        if told.state is not State.ONLINE:
            return
        model = told.model
        before = self._queue_s.get(model, told.queue_s)
        self._queue_s[model] = queue_s = before + SMOOTHING * (measured.queue_s - before)
        every_s = max(FIGURES_S_MIN, FIGURES_S_PER_KEY * len(span_keys(model, told.span)))
        age_s = self._clock.now() - self._told_at[model]
        if age_s < every_s:
            return
        figures = replace(measured, queue_s=queue_s, neighbour_rtts=told.neighbour_rtts)
        if _matters(told, figures) or self._has_new_neighbours(told, age_s, every_s):
            self.announce(replace(figures, neighbour_rtts=self._neighbours(model)), self._blocks[model])

    def _has_new_neighbours(self, told: SpanRecord, age_s: float, every_s: float) -> bool:
        """Whether round trips alone are worth a record now. Compared seldom: that sorts all servers."""
        now = self._clock.now()
        if told.neighbour_rtts and age_s < NEIGHBOURS_S_MIN:
            return False
        if now - self._compared_at.get(told.model, float("-inf")) < every_s:
            return False
        self._compared_at[told.model] = now
        known = {peer for peer, _ in told.neighbour_rtts}
        return any(peer not in known for peer, _ in self._neighbours(told.model))

    def _neighbours(self, model: ModelId) -> tuple[tuple[bytes, float], ...]:
        """Round trips to other servers of the model, as far as this node was connected to them lately; the nearest first."""
        measured = [
            (rtt_s, server.peer)
            for server in self._swarm.view(model).servers
            if (rtt_s := self._host.rtt_s(PeerId.from_bytes(server.peer))) is not None
        ]
        return tuple((peer, rtt_s) for rtt_s, peer in sorted(measured)[:NEIGHBOURS_MAX])

    def announce_manifest(self, manifest: Manifest) -> None:
        """Know what drivers need to know of a model, and publish it if that is this server's part. Raises LimitExceeded."""
        before = self._manifests.get(manifest.model)
        own = _OwnManifest(manifest, encode_manifest(manifest), before is not None and before.published)
        self._manifests[manifest.model] = own
        self._swarm.put_own_manifest(manifest)
        if self._is_keeper(own):
            self._publish_manifest(own)
        elif own.published:
            self._abandon_manifest(own)

    def keep_manifests(self) -> None:
        """Begin and end to publish manifests as the swarm changes; looks every `KEEPERS_S`."""
        now = self._clock.now()
        if now - self._judged_at < KEEPERS_S:
            return
        self._judged_at = now
        for own in self._manifests.values():
            keeper = self._is_keeper(own)
            if own.published and not keeper:
                self._abandon_manifest(own)
            elif keeper and not own.published:
                try:
                    self._publish_manifest(own)
                except LimitExceeded as error:  # other records of ours fill the table: one of them may go
                    log.debug("the manifest of %s is not published: %s", own.manifest.name, error)

    def _publish_manifest(self, own: _OwnManifest) -> None:
        self._dht.publish(MANIFESTS_KEY, bytes(own.manifest.model), own.value, MANIFEST_TTL_S)
        own.published = True

    def _abandon_manifest(self, own: _OwnManifest) -> None:
        self._dht.abandon(MANIFESTS_KEY, bytes(own.manifest.model))
        own.published = False

    def _is_keeper(self, own: _OwnManifest) -> bool:
        """Nobody becomes one because no server was seen for as long as records live: then nothing is known, maybe."""
        if self._is_needed(own):
            return True
        model, peer = own.manifest.model, self._host.peer_id.multihash
        servers = self._swarm.view(model).servers
        may_be = own.published or self._swarm.is_known_since(model, SPAN_TTL_S)
        return may_be and keeps_manifest(model, peer, servers, publishes=own.published)

    def _is_needed(self, own: _OwnManifest) -> bool:
        """Whether every server's word counts: hardly anybody says what we say, or what others say comes near to outvoting it."""
        now, manifest = self._clock.now(), own.manifest
        claims = self._swarm.manifest_claims(manifest.model)
        same = sum((found.files, found.tensors) == (manifest.files, manifest.tensors) for found, _ in claims)
        if CONTESTED_TIMES * (len(claims) - same) > same:
            own.contested_until = now + CONTESTED_S
        return now < own.contested_until or same < OTHERS_MIN

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
        manifests = [
            self._dht.withdraw(MANIFESTS_KEY, bytes(model)) for model in self._manifests
        ]  # those that were abandoned too, as long as they live
        for model in list(self._records):
            self._swarm.remove_own(model)
        self._records.clear()
        self._manifests.clear()
        await asyncio.gather(*withdrawals, *manifests)


def _claim_of(record: SpanRecord) -> object:
    """What others must know at once."""
    return record.state, record.span, record.compute_class, record.addresses


def _matters(told: SpanRecord, now: SpanRecord) -> bool:
    """Whether routes could be chosen differently by these figures, neighbours aside."""
    seconds = zip((told.queue_s, told.step_s), (now.queue_s, now.step_s), strict=True)
    room_before, room_now = told.free_tokens or 0, now.free_tokens or 0
    return any(abs(new - old) > max(MATTERS_S, MATTERS_SHARE * old) for old, new in seconds) or abs(
        room_now - room_before
    ) > MATTERS_SHARE * max(room_before, 1)


def keeps_manifest(model: ModelId, own: bytes, servers: Iterable[SpanRecord], *, publishes: bool) -> bool:
    """Whether ``own`` is among the servers of a model that a hash draws to keep its manifest.

    Servers that are leaving don't count. ``publishes``: it does so now, and goes on until twice as many come before it.
    """
    mine = _draw(model, own)
    before = sum(
        1
        for server in servers
        if server.state is not State.DRAINING and server.peer != own and _draw(model, server.peer) < mine
    )
    return before < (2 * MANIFEST_KEEPERS if publishes else MANIFEST_KEEPERS)


@lru_cache(maxsize=DRAWS_CACHED)
def _draw(model: ModelId, peer: bytes) -> bytes:
    return hashlib.sha256(b"peerd/manifest-keeper/1" + model + peer).digest()
