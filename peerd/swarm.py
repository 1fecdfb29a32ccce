"""This node's view of the swarm: the catalog kept fresh from the DHT, names, routes and blame.

A shell over `routing`: owns when to look and whom to wake, decides nothing. Looks often while somebody waits or generates, seldom when
idle, at once on demand.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from blocks.model.errors import BadManifest
from blocks.model.identity import Manifest
from blocks.model.source import block_count
from overlay.dht.node import Dht
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.identity import PeerId
from overlay.ports import Clock, Randomness
from routing.catalog import Catalog, ModelView, neediest
from routing.costs import Costs, link_table
from routing.errors import BlocksUnserved
from routing.health import Health, fault_of
from routing.planner import Question, plan_route
from routing.records import BLOCKS_PER_GROUP, MANIFESTS_KEY, SpanRecord, span_keys
from routing.types import ComputeClass, ModelId, Route, Span

log = logging.getLogger(__name__)

BUSY_REFRESH_S = 2.0
IDLE_REFRESH_S = 10.0
BUSY_FOR_S = 15.0
MANIFESTS_MAX = 1024
NAME_DIGITS = 12


class UnknownModel(PeerdError):
    """No model of that name is known in this network."""

    code = "unknown-model"
    exit_code = 53
    http_status = 404
    blame = Blame.USER


class AmbiguousModel(PeerdError):
    """A name, or none, that several models answer to."""

    code = "model-required"
    exit_code = 54
    http_status = 400
    blame = Blame.USER


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model of the network: its manifest, and who published it."""

    manifest: Manifest
    publishers: tuple[bytes, ...]

    @property
    def blocks(self) -> int:
        return block_count(json.loads(self.manifest.config))


class Swarm:
    """See the module. `run` is its background task."""

    def __init__(self, host: Host, dht: Dht, clock: Clock, randomness: Randomness) -> None:
        self._host = host
        self._dht = dht
        self._clock = clock
        self._salt = randomness.token(16)
        self._catalog = Catalog()
        self._health = Health()
        self._models: dict[ModelId, KnownModel] = {}
        self._block_counts: dict[ModelId, int] = {}
        self._own: dict[ModelId, SpanRecord] = {}
        self._own_manifests: dict[ModelId, Manifest] = {}
        self._busy_until = 0.0
        self._wake = asyncio.Event()
        self._changed_event = asyncio.Event()
        self._refreshing: asyncio.Lock = asyncio.Lock()
        self._seen: object = None

    # --- what is known ---

    def models(self) -> tuple[KnownModel, ...]:
        """Every model with a manifest, by name and id."""
        return tuple(sorted(self._models.values(), key=lambda known: (known.manifest.name, known.manifest.model)))

    def known(self, model: ModelId) -> KnownModel | None:
        return self._models.get(model)

    def name_of(self, model: ModelId) -> str:
        """The name that this model can be asked for by: with 12 digits of the id where that is ambiguous."""
        known = self._models.get(model)
        if known is None:
            return model.hex()[:NAME_DIGITS]
        name = known.manifest.name
        twins = [other for other in self._models.values() if other.manifest.name == name]
        return name if len(twins) == 1 else f"{name}@{model.hex()[:NAME_DIGITS]}"

    def resolve_name(self, name: str | None) -> KnownModel:
        """The model that a request means. Raises UnknownModel, AmbiguousModel."""
        listed = ", ".join(self.name_of(known.manifest.model) for known in self.models()) or "none"
        if name is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            if not self._models:
                raise UnknownModel("No model is known in this network yet; start a server, or wait until one is found.")
            raise AmbiguousModel(f"Several models are served; name one of: {listed}.")
        bare, _, digits = name.partition("@")
        found = [
            known
            for known in self._models.values()
            if known.manifest.name in (bare, name)
            and known.manifest.model.hex().startswith(digits if bare != name else "")
        ]
        if not found:
            raise UnknownModel(f"No model {name!r} is known here; there is: {listed}.")
        if len(found) > 1:
            raise AmbiguousModel(f"Several models are called {name!r}; name one of: {listed}.")
        return found[0]

    def view(self, model: ModelId) -> ModelView:
        """Who serves what of one model, as known now."""
        return self._catalog.view(model, self._block_counts.get(model, 1), self._clock.now())

    def expect_blocks(self, model: ModelId, blocks: int) -> None:
        """How many blocks a model has that nobody has announced yet."""
        self._block_counts.setdefault(model, blocks)

    def neediest(self, models: Sequence[ModelId]) -> ModelId | None:
        """Which of ``models`` wants servers most."""
        return neediest({model: self.view(model) for model in models})

    def compute_class_of(self, model: ModelId) -> ComputeClass | None:
        """The class that the model is served in: the manifest's of the greatest cover, or None when nobody serves it."""
        view = self.view(model)
        classes = sorted({server.compute_class for server in view.servers})
        if classes:
            return max(classes, key=lambda found: sum(1 for n in view.replicas(compute_class=found) if n))
        known = self._models.get(model)
        return None if known is None else known.manifest.compute

    # --- our own part ---

    def put_own(self, record: SpanRecord, blocks: int) -> None:
        """Our record counts at once, here."""
        self._block_counts[record.model] = blocks
        self._own[record.model] = record
        self._catalog.put(record, float("inf"))
        self._notify()

    def remove_own(self, model: ModelId) -> None:
        if self._own.pop(model, None) is not None:
            self._catalog.remove(model, self._host.peer_id.multihash)
            self._notify()

    def put_own_manifest(self, manifest: Manifest) -> None:
        self._own_manifests[manifest.model] = manifest
        self._add_manifest(manifest, self._host.peer_id.multihash)
        self._notify()

    def _add_manifest(self, manifest: Manifest, publisher: bytes) -> None:
        known = self._models.get(manifest.model)
        publishers = () if known is None else tuple(peer for peer in known.publishers if peer != publisher)
        if known is not None and known.publishers:
            manifest = known.manifest
        self._models[manifest.model] = KnownModel(manifest, (*publishers, publisher))
        self._block_counts[manifest.model] = self._models[manifest.model].blocks

    # --- keeping fresh ---

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            wait_s = BUSY_REFRESH_S if self._clock.now() < self._busy_until else IDLE_REFRESH_S
            if not self._models:
                wait_s = BUSY_REFRESH_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def refresh(self) -> None:
        """Look at manifests and records now; concurrent callers share the work one after the other."""
        async with self._refreshing:
            await self._refresh_manifests()
            for model in sorted(self._models):
                await self._refresh_model(model)
        seen = (tuple(sorted(self._models)), tuple(self.view(model).servers for model in sorted(self._models)))
        if seen != self._seen:
            self._seen = seen
            self._notify()

    async def _refresh_manifests(self) -> None:
        found: dict[ModelId, KnownModel] = {}
        for record in await self._dht.get(MANIFESTS_KEY):
            if len(found) >= MANIFESTS_MAX:
                break
            try:
                manifest = Manifest.from_document(msgpack.unpackb(record.value))
                count = block_count(json.loads(manifest.config))
            except (BadManifest, PeerdError, ValueError, msgpack.UnpackException) as error:
                log.debug("a manifest of %s is of no use: %s", record.publisher.short, error)
                continue
            known = found.get(manifest.model)
            publishers = () if known is None else known.publishers
            kept = manifest if known is None else known.manifest
            found[manifest.model] = KnownModel(kept, (*publishers, record.publisher.multihash))
            self._block_counts[manifest.model] = count
        self._models = found
        for manifest in self._own_manifests.values():
            self._add_manifest(manifest, self._host.peer_id.multihash)

    async def _refresh_model(self, model: ModelId) -> None:
        blocks = self._block_counts[model]
        keys = span_keys(model, Span(0, blocks))
        assert len(keys) == (blocks - 1) // BLOCKS_PER_GROUP + 1
        answers = await asyncio.gather(*(self._dht.get(key) for key in keys))
        now = self._clock.now()
        newest: dict[bytes, tuple[int, bytes, float]] = {}
        for record in (record for answer in answers for record in answer):
            publisher = record.publisher.multihash
            known = newest.get(publisher)
            if known is None or record.sequence > known[0]:
                newest[publisher] = (record.sequence, record.value, float(record.ttl_s))
        found = [(publisher, value, left_s) for publisher, (_, value, left_s) in sorted(newest.items())]
        self._catalog.replace(model, found, now)
        own = self._own.get(model)
        if own is not None:
            self._catalog.put(own, float("inf"))

    def _notify(self) -> None:
        changed, self._changed_event = self._changed_event, asyncio.Event()
        changed.set()

    async def wait_changed(self, timeout_s: float) -> None:
        """Until the swarm looks different, or ``timeout_s``; looks again meanwhile."""
        self.stay_fresh()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed_event.wait()
        except TimeoutError:
            return

    def stay_fresh(self) -> None:
        """Somebody waits or generates: look often for a while."""
        now = self._clock.now()
        if now >= self._busy_until:
            self._wake.set()
        self._busy_until = now + BUSY_FOR_S

    def look_now(self) -> None:
        """Refresh at once, in the background."""
        self._wake.set()

    # --- routes ---

    def plan(self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes]) -> Route:
        """The best route now. Raises BlocksUnserved, BlocksPending."""
        self.stay_fresh()
        now = self._clock.now()
        view = self.view(model)
        own = self._host.peer_id.multihash
        costs = Costs(link_table(view.servers, own, self._measured_rtt))
        question = Question(own, compute_class, tuple(avoid), salt=self._salt)
        try:
            return plan_route(view, self.name_of(model), question, costs, self._health, now)
        except BlocksUnserved:
            self._wake.set()
            raise

    def _measured_rtt(self, peer: bytes) -> float | None:
        connection = self._host.connection(PeerId.from_bytes(peer))
        return None if connection is None else connection.rtt_s

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        """A session's experience with a peer, or with its link to ``edge``."""
        fault = fault_of(error.code, error.blame)
        if fault is not None:
            self._health.blame(peer, fault, self._clock.now(), edge)
        self._wake.set()
