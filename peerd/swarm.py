"""This node's view of the swarm: the catalog kept fresh from the DHT, names, routes and blame.

A shell over `routing`: owns when to look and whom to wake, decides nothing. Looks often while somebody waits or generates, seldom when
idle, at once on demand; first at the models that this node serves or drives, at a bounded number of others in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blocks.model.identity import Manifest
from blocks.model.source import block_count
from overlay.dht.following import FollowedKey
from overlay.dht.node import Dht
from overlay.dht.records import Record
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.identity import PeerId
from overlay.ports import Clock, Randomness
from peerd.manifest_record import decode_manifest
from routing.catalog import Catalog, ModelView, Sighting, neediest
from routing.costs import Costs, least_link_s, link_table
from routing.errors import BlocksPending, BlocksUnserved
from routing.health import Health, fault_of
from routing.planner import Question, plan_route
from routing.records import MANIFESTS_KEY, SpanRecord, State, span_keys
from routing.types import ComputeClass, ModelId, Route, Span

log = logging.getLogger(__name__)

BUSY_REFRESH_S = 2.0
IDLE_REFRESH_S = 10.0
IDLE_REFRESH_MAX_S = 20.0
SERVING_REFRESH_MAX_S = 45.0
"""For a daemon that serves and that nobody asks anything: it holds what it holds, and looks before it drives. Less than the minute
that records live: a view that empties before each look would have every server publish the manifest."""
IDLE_SERVERS = 100
"""Where more servers are known than these, each idle daemon looks less often: somebody sees a gap as soon."""
BUSY_FOR_S = 15.0
MANIFESTS_EVERY_S = 8.0
"""Manifests are larger than records and change less."""
MANIFESTS_IDLE_S = 60.0
LOOK_S = 2.0
"""A look that takes longer isn't waited for where something is known already."""
FRESH_S = 3.0
"""Blocks that nobody serves are said to be so on the word of a look no older than this."""
INTEREST_S = 120.0
OTHERS_PER_REFRESH = 16
FEW_CONTACTS = 20
"""In a network of fewer nodes a newcomer looks thoroughly."""
LOOKUPS_AT_ONCE = 16
MANIFESTS_MAX = 1024
NAME_DIGITS = 12


class UnknownModel(PeerdError):
    """No model of that name is known in this network."""

    code = "unknown-model"
    exit_code = 40
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
        self.health = Health()
        self._models: dict[ModelId, KnownModel] = {}
        self._block_counts: dict[ModelId, int] = {}
        self._own: dict[ModelId, SpanRecord] = {}
        self._planned_at: dict[ModelId, float] = {}
        self._seen_at: dict[ModelId, float] = {}
        self._looked_at: dict[ModelId, float] = {}
        """Of thorough looks: that blocks are served by nobody is said on the word of these."""
        self._manifests_at = float("-inf")
        self._local_names: dict[str, frozenset[ModelId]] = {}
        self._read_manifests: dict[tuple[bytes, bytes, int], Manifest | None] = {}
        self._plans = itertools.count()
        self._own_manifests: dict[ModelId, Manifest] = {}
        self._busy_until = 0.0
        self._wake = asyncio.Event()
        self._changed_event = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._followed: dict[bytes, FollowedKey] = {}
        self._thorough = False
        self._claims: dict[ModelId, list[tuple[Manifest, bytes]]] = {}
        self._expected: set[ModelId] = set()
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
        if self._local_names.get(name) == frozenset({model}):
            return name
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
        found = [known for known in self._models.values() if self._answers_to(known, name)]
        ours = self._local_names.get(name, frozenset())
        found = [known for known in found if known.manifest.model in ours] or found
        if not found:
            raise UnknownModel(f"No model {name!r} is known here; there is: {listed}.")
        if len(found) > 1:
            raise AmbiguousModel(f"Several models are called {name!r}; name one of: {listed}.")
        return found[0]

    @staticmethod
    def _answers_to(known: KnownModel, name: str) -> bool:
        """By its name, its name and the first digits of its id, or the id itself."""
        model, own_name = known.manifest.model.hex(), known.manifest.name
        bare, _, digits = name.rpartition("@")
        with_digits = bare == own_name and len(digits) >= NAME_DIGITS and model.startswith(digits)
        return name == own_name or with_digits or name == model

    def learn_name(self, name: str, model: ModelId) -> None:
        """``name`` was resolved from its source by this node: no publisher's claim stands against that."""
        self._local_names[name] = self._local_names.get(name, frozenset()) | {model}

    def view(self, model: ModelId) -> ModelView:
        """Who serves what of one model, as known now."""
        return self._catalog.view(model, self._block_counts.get(model, 1), self._clock.now())

    def expect_blocks(self, model: ModelId, blocks: int) -> None:
        """How many blocks a model has that nobody has announced yet."""
        self._block_counts.setdefault(model, blocks)
        self._expected.add(model)

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
        self._catalog.put_own(record)
        self._notify()

    def remove_own(self, model: ModelId) -> None:
        if self._own.pop(model, None) is not None:
            self._catalog.remove_own(model)
            self._notify()

    def manifest_claims(self, model: ModelId) -> list[tuple[Manifest, bytes]]:
        """What others publish as the manifest of a model, and who, as of the last look."""
        own = self._host.peer_id.multihash
        return [(manifest, peer) for manifest, peer in self._claims.get(model, ()) if peer != own]

    def put_own_manifest(self, manifest: Manifest) -> None:
        self._own_manifests[manifest.model] = manifest
        self.learn_name(manifest.name, manifest.model)
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
            await self._look()
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    def _pause_s(self) -> float:
        """Until the next look, if nobody asks for one before."""
        if self._is_busy() or not self._models:
            return BUSY_REFRESH_S
        known = max(len(self.view(model).servers) for model in self._block_counts) if self._block_counts else 0
        at_most_s = SERVING_REFRESH_MAX_S if self._own else IDLE_REFRESH_MAX_S
        return min(at_most_s, IDLE_REFRESH_S * max(1.0, known / IDLE_SERVERS))

    def _is_busy(self) -> bool:
        return self._clock.now() < self._busy_until

    async def refresh(self) -> None:
        """Look at manifests and records now, and thoroughly; concurrent callers do so one after the other."""
        self._manifests_at = float("-inf")
        self._thorough = True
        await self._look()

    async def first_look(self) -> None:
        """Before a newcomer chooses: thorough where few nodes are known, for a young network changes by the second."""
        if self._dht.statistics().contacts < FEW_CONTACTS:
            await self.refresh()
        else:
            await self._look()

    async def _look(self) -> None:
        async with self._refreshing:
            thorough, self._thorough = self._thorough, False
            every_s = MANIFESTS_EVERY_S if self._is_busy() else MANIFESTS_IDLE_S
            if self._clock.now() - self._manifests_at >= every_s or not self._models:
                await self._refresh_manifests(thorough=thorough)
            await asyncio.gather(*(self._refresh_model(model, thorough=thorough) for model in self._due_models()))
        seen = (tuple(sorted(self._models)), tuple(self.view(model).servers for model in sorted(self._models)))
        if seen != self._seen:
            self._seen = seen
            self._notify()

    async def freshen(self, model: ModelId) -> None:
        """Look first, if what is known is older than an idle daemon's (for `LOOK_S` at most), or blocks seem to be served by nobody."""
        if self._is_stale(model) and not self._gaps(model):
            self._planned_at[model] = self._clock.now()  # it matters from now on
            try:
                async with asyncio.timeout(LOOK_S), self._refreshing:
                    if self._is_stale(model):  # of many who ask at once the first looks
                        await self._refresh_model(model, thorough=False)
            except TimeoutError:
                log.debug("a look at %s takes long; what was known before has to do", self.name_of(model))
        if self._gaps(model) and not self._is_fresh(model):
            await self.refresh()

    def _gaps(self, model: ModelId) -> tuple[Span, ...]:
        return self.view(model).missing(State.ONLINE, State.JOINING)

    def _is_stale(self, model: ModelId) -> bool:
        return not self.is_known_since(model, IDLE_REFRESH_MAX_S + LOOK_S)

    def is_known_since(self, model: ModelId, seconds: float) -> bool:
        """Whether somebody looked at a model no longer ago than ``seconds``."""
        return self._clock.now() - self._seen_at.get(model, float("-inf")) <= seconds

    def _is_fresh(self, model: ModelId) -> bool:
        return self._clock.now() - self._looked_at.get(model, float("-inf")) <= FRESH_S

    def _due_models(self) -> list[ModelId]:
        """Those that matter to this node, and of the others the ones that were looked at longest ago."""
        since = self._clock.now() - INTEREST_S
        mine = [model for model in self._block_counts if self._matters(model, since)]
        others = [model for model in self._models if not self._matters(model, since)]
        others.sort(key=lambda model: (self._seen_at.get(model, float("-inf")), model))
        return [*sorted(mine), *others[:OTHERS_PER_REFRESH]]

    def _matters(self, model: ModelId, since: float) -> bool:
        return model in self._own or model in self._expected or self._planned_at.get(model, float("-inf")) >= since

    async def _refresh_manifests(self, *, thorough: bool) -> None:
        started = self._clock.now()
        read: dict[tuple[bytes, bytes, int], Manifest | None] = {}
        found: dict[ModelId, list[tuple[Manifest, bytes]]] = {}
        self._manifests_at = started  # at the start: who asks for them meanwhile has them read again
        try:
            records = await self._follow(MANIFESTS_KEY).read(thorough=thorough)
        except BaseException:
            self._manifests_at = float("-inf")
            raise
        for record in records:
            name = (*record.name, record.sequence)
            manifest = read[name] = self._read_manifests[name] if name in self._read_manifests else _manifest_of(record)
            if manifest is not None and (manifest.model in found or len(found) < MANIFESTS_MAX):
                found.setdefault(manifest.model, []).append((manifest, record.publisher.multihash))
        self._read_manifests = read
        self._models = {model: _agreed(claims) for model, claims in found.items()}
        self._claims = found
        self._block_counts.update({model: known.blocks for model, known in self._models.items()})
        for manifest in self._own_manifests.values():
            self._add_manifest(manifest, self._host.peer_id.multihash)
        self._forget()

    def _forget(self) -> None:
        """What nobody announces any more, and nobody here asks for."""
        since = self._clock.now() - INTEREST_S
        kept = [model for model in self._block_counts if model in self._models or self._matters(model, since)]
        self._block_counts = {model: self._block_counts[model] for model in kept}
        for table in (self._planned_at, self._looked_at, self._seen_at):
            for model in [model for model in table if model not in self._block_counts]:
                del table[model]
        keys = {MANIFESTS_KEY: None}
        for model in kept:
            keys |= dict.fromkeys(span_keys(model, Span(0, self._block_counts[model])))
        self._followed = {key: followed for key, followed in self._followed.items() if key in keys}
        self._catalog.forget_others_than(kept)

    async def _refresh_model(self, model: ModelId, *, thorough: bool) -> None:
        keys = span_keys(model, Span(0, self._block_counts[model]))
        answers = await asyncio.gather(*(self._read(key, thorough=thorough) for key in keys))
        self._catalog.replace(model, _sightings(itertools.chain.from_iterable(answers)), self._clock.now())
        self._seen_at[model] = self._clock.now()
        if thorough:
            self._looked_at[model] = self._clock.now()

    async def _read(self, key: bytes, *, thorough: bool) -> tuple[Record, ...]:
        async with self._lookups:
            return await self._follow(key).read(thorough=thorough)

    def _follow(self, key: bytes) -> FollowedKey:
        followed = self._followed.get(key)
        if followed is None:
            followed = self._followed[key] = self._dht.follow(key)
        return followed

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

    def hung_up(self, peer: bytes) -> None:
        """The connection to ``peer`` ended: if it serves something, a daemon that drives sees at once whether it still does.

        Others see it with their next look: dozens are connected to each server, and all of them looking at once is a herd.
        """
        if self._catalog.doubt(peer) and self._drives():
            self._wake.set()

    def _drives(self) -> bool:
        """Whether somebody here waits, generates, or did so lately."""
        now = self._clock.now()
        return now < self._busy_until or any(planned_at >= now - INTEREST_S for planned_at in self._planned_at.values())

    def look_now(self) -> None:
        """Refresh at once, in the background."""
        self._manifests_at = float("-inf")
        self._wake.set()

    # --- routes ---

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        """The best route now, through ``span`` of the model (None: all of it).

        Raises:
            BlocksUnserved: nobody serves or loads some blocks, by a fresh look.
            BlocksPending: they are loading, busy or avoided, or a fresh look is under way.
        """
        self.stay_fresh()
        now = self._clock.now()
        self._planned_at[model] = now
        view = self.view(model)
        own = self._host.peer_id.multihash
        links = link_table(view.servers, own, self._measured_rtt)
        costs = Costs(links, least_link_s=least_link_s(view.servers, own, self._measured_rtt))
        salt = self._salt + next(self._plans).to_bytes(8, "big")
        question = Question(own, compute_class, tuple(avoid), salt=salt, span=span)
        try:
            return plan_route(view, self.name_of(model), question, costs, self.health, now)
        except BlocksUnserved as error:
            self._thorough = True
            self._wake.set()
            if not self._is_fresh(model):
                raise BlocksPending(self.name_of(model), error.spans) from error
            raise

    def _measured_rtt(self, peer: bytes) -> float | None:
        return self._host.rtt_s(PeerId.from_bytes(peer))

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        """A session's experience with a peer, or with its link to ``edge``."""
        fault = fault_of(error.code, error.blame)
        if fault is not None:
            self.health.blame(peer, fault, self._clock.now(), edge)
        self._wake.set()

    def praise(self, peers: Iterable[bytes]) -> None:
        """A session went well with these."""
        for peer in peers:
            self.health.forgive(peer)


def _manifest_of(record: Record) -> Manifest | None:
    try:
        manifest = decode_manifest(record.value)
        block_count(json.loads(manifest.config))
    except PeerdError as error:
        log.debug("a manifest of %s is of no use: %s", record.publisher.short, error)
        return None
    return manifest


def _agreed(claims: Sequence[tuple[Manifest, bytes]]) -> KnownModel:
    """Of the manifests of one model, the one whose files and tensors most of its publishers name."""
    votes: dict[object, int] = {}
    for manifest, _ in claims:
        votes[manifest.files, manifest.tensors] = votes.get((manifest.files, manifest.tensors), 0) + 1
    chosen, _ = max(claims, key=lambda claim: votes[claim[0].files, claim[0].tensors])
    return KnownModel(chosen, tuple(publisher for _, publisher in claims))


def _sightings(records: Iterable[Record]) -> list[Sighting]:
    return [Sighting(found.publisher.multihash, found.sequence, float(found.ttl_s), found.value) for found in records]
