"""The models of this node: which it serves, how far they are loaded, and which it can drive.

Owns the life of a served span (resolve, claim, load, online, drain) and the making of drivers on demand. Admission of sessions by
KV memory is `peerd.admission`; what to say in the DHT is `peerd.announcer`; slow work on files and torch is `peerd.loading`'s.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from blocks.model.identity import Manifest, id_of
from blocks.model.source import DEMO, ModelSource, text_config
from blocks.protocol.device import Device, JobResult, LeaseKey, ReleaseJob, SpanJob
from blocks.sizing import Footprint, Sizing, footprint, kv_values_of, outside_parameters, size_up, stored_parameters
from blocks.text import TextCodec
from overlay.errors import Blame, PeerdError
from overlay.host import Host
from overlay.ports import Clock
from overlay.rpc.types import DTYPE_BYTES, Part
from peerd.admission import KvAdmission
from peerd.announcer import Announcer
from peerd.client.tensor_body import Tensor
from peerd.config import AUTO, NONE, Config
from peerd.decoding import DriverModel
from peerd.first_look import BadSpan, require_span
from peerd.loading import ModelLoader
from peerd.model_exchange import ModelFetcher, ModelShelf
from peerd.swarm import KnownModel, Swarm
from peerd.version import VERSION
from routing.catalog import ModelView
from routing.placement import choose_span, settle_claim
from routing.records import SpanRecord, State
from routing.types import ComputeClass, ModelId, Span

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CLAIM_SETTLES_S = 0.4
FIND_NETWORK_S = 2.0
PROGRESS_S = 3.0
"""How often a load that takes long says how far it is."""
MEASURED_STEPS = 4
KV_BYTES_MIN = 64 << 20
LOW_MEMORY_SHARE = 0.5
"""float32 fits when the whole span takes less than this of the allowed memory."""


class WrongClass(PeerdError):
    """This machine can't run the class that the model is served in."""

    code = "wrong-class"
    exit_code = 16
    http_status = 503
    blame = Blame.US


@dataclass(slots=True)
class Served:
    """One model that this node serves, or is about to."""

    name: str
    model: ModelId
    source: ModelSource
    record: SpanRecord
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class Drivable:
    """A model that this node can drive."""

    driver: DriverModel
    codec: TextCodec


def model_key(model: ModelId, compute_class: ComputeClass) -> str:
    """The device's name for a model in a class."""
    return f"{model.hex()[:16]}/{compute_class}"


class ModelHost:
    """See the module. `serve_configured` is its background task."""

    def __init__(
        self,
        config: Config,
        host: Host,
        swarm: Swarm,
        announcer: Announcer,
        device: Device,
        loader: ModelLoader,
        clock: Clock,
        cache_dir: Path,
    ) -> None:
        self._config = config
        self._host = host
        self._swarm = swarm
        self._announcer = announcer
        self._device = device
        self._clock = clock
        self._loader = loader
        self._shelf = ModelShelf(host)
        self._fetcher = ModelFetcher(host, cache_dir / "fetched")
        self._served: dict[ModelId, Served] = {}
        self._sources: dict[ModelId, ModelSource] = {}
        self._drivable: dict[tuple[ModelId, ComputeClass], asyncio.Future[Drivable]] = {}
        self.admission = KvAdmission(device, clock)
        self.failure: PeerdError | None = None

    def close(self) -> None:
        """Let the loader end; what it does now is not waited for."""
        self._loader.close()

    def served(self) -> tuple[Served, ...]:
        return tuple(self._served.values())

    async def _told(self, served: Served, work: Coroutine[Any, Any, Result]) -> Result:
        """Await slow work on a model, and say every few seconds how far it is."""
        telling = asyncio.get_running_loop().create_task(self._tell_progress(served), name="loading progress")
        try:
            return await work
        finally:
            telling.cancel()

    async def _tell_progress(self, served: Served) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            log.info("loading blocks %s of %s: %d %%", served.record.span, served.name, 100 * served.progress)

    # --- serving ---

    async def serve_configured(self, *, new_network: bool) -> None:
        """Serve what the configuration says. Raises the PeerdError that makes it impossible."""
        config = self._config
        await self._loader.check_device()
        if config.serving.blocks == NONE:
            for spec in config.serving.models:
                await self._find_source(spec)
            return
        specs = config.serving.models or await self._choose_model(new_network=new_network)
        for spec in specs:
            await self._serve(spec)

    async def _choose_model(self, *, new_network: bool) -> tuple[str, ...]:
        """What the network needs most, of what can be had here; `demo` for a network of its own."""
        if new_network:
            return (DEMO,)
        log.info("looking for a model that the network needs")
        while True:
            usable = [
                known for known in self._swarm.models() if known.manifest.kind in ("demo", "hub") and known.publishers
            ]
            chosen = self._swarm.neediest([known.manifest.model for known in usable])
            if chosen is not None:
                known = next(known for known in usable if known.manifest.model == chosen)
                return (_spec_of(known.manifest),)
            await self._swarm.wait_changed(FIND_NETWORK_S)

    async def _find_source(self, spec: str) -> ModelSource:
        source = await self._loader.find(spec)
        self._sources[id_of(source)] = source
        self._swarm.learn_name(source.name, id_of(source))
        return source

    async def _serve(self, spec: str) -> None:
        source = await self._find_source(spec)
        model = id_of(source)
        started = self._clock.now()
        self._swarm.expect_blocks(model, source.blocks)  # so that claims are seen before anybody's manifest is
        await self._swarm.first_look()
        compute_class, span, sizing = self._place(source, model)
        before = frozenset(server.peer for server in self._swarm.view(model).servers)
        record = self._claim(source, model, span, compute_class)
        if self._config.serving.blocks == AUTO and len(span) < source.blocks and self._host.connections():
            span = await self._settle_claim(model, before, compute_class, len(span))
            record = self._claim(source, model, span, compute_class)
            await self._announcer.withdraw_stale()
        served = self._served[model]
        log.info("loading blocks %s of %s (%s)", span, source.name, compute_class)
        manifest = await self._told(served, self._make_manifest(served, span, compute_class))
        self._shelf.add(source, manifest)
        self._announcer.announce_manifest(manifest)
        max_positions = await self._told(served, self._load(served, span, compute_class))
        step_s, prefill_s = await self._measure(served, compute_class)
        token_bytes = kv_values_of(source.config) * DTYPE_BYTES[compute_class.dtype] * len(span)
        self.admission.serve(
            model,
            compute_class,
            model_key(model, compute_class),
            span,
            self._width(source),
            token_bytes,
            max_positions,
        )
        self.admission.budget.resize(self.admission.budget.total_bytes + sizing.kv_bytes)
        served.record = replace(
            record,
            state=State.ONLINE,
            step_s=step_s,
            prefill_s=prefill_s,
            free_tokens=sizing.kv_bytes // max(1, token_bytes),
        )
        served.progress = 1.0
        self._announcer.announce(served.record, source.blocks)
        took_s = self._clock.now() - started
        log.info("serving blocks %s of %s after %.1f s", span, source.name, took_s)

    def _place(self, source: ModelSource, model: ModelId) -> tuple[ComputeClass, Span, Sizing]:
        config = self._config
        free = self._loader.free_bytes()
        compute_class = self._compute_class(source, model, free)
        cost = _footprint(source, compute_class)
        if isinstance(config.serving.blocks, Span):
            require_span(source.name, source.blocks, config.serving.blocks)
            allowed = config.serving.max_memory_bytes or int(free * 0.7)
            kv_bytes = max(KV_BYTES_MIN, (allowed - len(config.serving.blocks) * cost.block_bytes) // 4)
            return compute_class, config.serving.blocks, Sizing(len(config.serving.blocks), kv_bytes)
        sizing = size_up(cost, source.blocks, free, config.serving.max_memory_bytes, config.serving.max_blocks)
        own = self._host.peer_id.multihash
        span = choose_span(self._view(source, model), sizing.blocks, compute_class, own)
        return compute_class, span, sizing

    def _view(self, source: ModelSource, model: ModelId) -> ModelView:
        self._swarm.expect_blocks(model, source.blocks)
        return self._swarm.view(model)

    def _compute_class(self, source: ModelSource, model: ModelId, free: int) -> ComputeClass:
        """What was asked for, else what is announced, else the best that fits: float32 on a CPU where it does."""
        config = self._config
        announced = self._swarm.compute_class_of(model)
        if announced is not None and config.serving.dtype == "auto" and config.serving.quant == "none":
            return announced
        if announced is not None and config.serving.dtype == "auto" and announced.quant == config.serving.quant:
            return announced
        dtype = config.serving.dtype
        if dtype == "auto":
            whole = _footprint(source, ComputeClass(config.serving.quant, "float32")).block_bytes * source.blocks
            allowed = config.serving.max_memory_bytes or free
            dtype = (
                "float32" if self._loader.device_name == "cpu" and whole < LOW_MEMORY_SHARE * allowed else "bfloat16"
            )
        return ComputeClass(config.serving.quant, dtype)

    def _claim(self, source: ModelSource, model: ModelId, span: Span, compute_class: ComputeClass) -> SpanRecord:
        addresses = tuple(str(address.without_peer()) for address in self._host.addresses)
        record = SpanRecord(
            self._host.peer_id.multihash, addresses, model, span, State.JOINING, compute_class, version=VERSION
        )
        self._served[model] = Served(source.name, model, source, record)
        self._announcer.announce(record, source.blocks)
        return record

    async def _settle_claim(
        self, model: ModelId, before: Collection[bytes], compute_class: ComputeClass, blocks: int
    ) -> Span:
        """Choose again once others' claims of the same moment are known; see `routing.placement.settle_claim`."""
        await asyncio.sleep(CLAIM_SETTLES_S)
        await self._swarm.refresh()
        return settle_claim(self._swarm.view(model), before, self._host.peer_id.multihash, blocks, compute_class)

    async def _make_manifest(self, served: Served, span: Span, compute_class: ComputeClass) -> Manifest:
        def progress(share: float) -> None:
            served.progress = 0.5 * share

        return await self._loader.make_manifest(served.source, span, compute_class, progress)

    async def _load(self, served: Served, span: Span, compute_class: ComputeClass) -> int:
        """Load the span onto the device; returns the longest context that it runs."""

        def progress(share: float) -> None:
            served.progress = 0.5 + 0.4 * share

        key = model_key(served.model, compute_class)
        return await self._loader.load_span(key, served.source, span, compute_class, progress)

    async def _measure(self, served: Served, compute_class: ComputeClass) -> tuple[float, float]:
        """Seconds of one token through one block: step by step, and within a window."""
        key, span = model_key(served.model, compute_class), served.record.span
        lease = LeaseKey(b"measurement-----", 0)
        width = self._width(served.source)
        steps: list[float] = []
        window_s = 0.0
        for index, tokens in enumerate((16, *[1] * MEASURED_STEPS)):
            position = 0 if index == 0 else 15 + index
            data = bytes(tokens * width * DTYPE_BYTES[compute_class.dtype])
            hidden = Part("hidden", compute_class.dtype, (tokens, width), bytearray(data))
            result = await self._submit(SpanJob(key, lease, span, position, tokens, hidden, 64))
            if result.error is not None:
                raise result.error
            if index == 0:
                window_s = result.seconds / tokens
            else:
                steps.append(result.seconds)
        await self._submit(ReleaseJob(lease))
        return min(steps) / len(span), window_s / len(span)

    async def _submit(self, job: SpanJob | ReleaseJob) -> JobResult:
        done: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._device.submit((job,), lambda result: None if done.done() else done.set_result(result))
        return await done

    def _width(self, source: ModelSource) -> int:
        return hidden_width(source.config, source.name)

    def measure(self, record: SpanRecord) -> SpanRecord:
        """A record of ours with the figures of this moment."""
        free_tokens = self.admission.free_tokens(record.model, record.compute_class)
        queue_s = self._device.queue_depth * record.step_s * len(record.span)
        return replace(record, queue_s=queue_s, free_tokens=free_tokens)

    def drain(self) -> None:
        """Say that everything served here is leaving."""
        for served in self._served.values():
            served.record = replace(served.record, state=State.DRAINING)
        self._announcer.drain()

    # --- driving ---

    async def drivable(self, known: KnownModel) -> Drivable:
        """Embeddings, head and tokenizer of a model, loaded once. Raises PeerdError, and then may be tried again."""
        model = known.manifest.model
        compute_class = self._swarm.compute_class_of(model) or known.manifest.compute
        key = (model, compute_class)
        pending = self._drivable.get(key)
        if pending is None:
            pending = asyncio.ensure_future(self._make_drivable(known, compute_class))  # noqa: TID251 - shared by its waiters
            self._drivable[key] = pending
            pending.add_done_callback(lambda done: self._forget_failed(key, done))
        return await asyncio.shield(pending)

    def _forget_failed(self, key: tuple[ModelId, ComputeClass], done: asyncio.Future[Drivable]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._drivable.pop(key, None)

    async def _make_drivable(self, known: KnownModel, compute_class: ComputeClass) -> Drivable:
        manifest = known.manifest
        source = await self._local_source(manifest)
        key = model_key(manifest.model, compute_class)
        if source is not None:
            codec = await self._loader.read_codec(source)
            head = await self._loader.load_head(key, source, compute_class)
        else:
            servers = self._servers_of(known)
            codec = TextCodec(await self._fetcher.text_files(manifest, servers))
            tensors = await self._fetcher.tensors(manifest, servers)
            head = await self._loader.load_fetched_head(key, manifest, tensors, compute_class)
        return Drivable(DriverModel(key, manifest.model, compute_class, head.width, head.max_positions), codec)

    async def described(self, known: KnownModel) -> DriverModel:
        """Enough of a model to have its blocks called; loads nothing. Raises PeerdError."""
        manifest = known.manifest
        compute_class = self._swarm.compute_class_of(manifest.model) or manifest.compute
        max_positions = await self._loader.context_tokens(manifest.config)
        width = hidden_width(json.loads(manifest.config), manifest.name)
        key = model_key(manifest.model, compute_class)
        return DriverModel(key, manifest.model, compute_class, width, max_positions)

    async def outside(self, known: KnownModel) -> dict[str, Tensor]:
        """The tensors outside the blocks, for a client that has no files of the model. Raises PeerdError."""
        manifest = known.manifest
        source = await self._local_source(manifest)
        if source is not None:
            return await self._loader.outside_tensors(source)
        received = await self._fetcher.tensors(manifest, self._servers_of(known))
        return {entry.name: Tensor(entry.dtype, entry.shape, received[entry.name]) for entry in manifest.tensors}

    async def _local_source(self, manifest: Manifest) -> ModelSource | None:
        """The model's files here, if they are the very ones; a hub's model comes from the hub where that can be reached."""
        found = self._sources.get(manifest.model)
        if found is not None:
            return found
        if manifest.kind == "directory":
            return None
        try:
            source = await self._find_source(_spec_of(manifest))
        except PeerdError as error:
            log.info("%s can't be had from its source (%s); asking its servers", manifest.name, error)
            return None
        return source if id_of(source) == manifest.model else None

    def _servers_of(self, known: KnownModel) -> tuple[tuple[bytes, tuple[str, ...]], ...]:
        own = self._host.peer_id.multihash
        view = self._swarm.view(known.manifest.model)
        online = [(server.peer, server.addresses) for server in view.servers if server.state is State.ONLINE]
        return tuple(entry for entry in online if entry[0] != own)


def hidden_width(config: Mapping[str, Any], name: str) -> int:
    """d_model, from the config."""
    fields = text_config(config)
    for field in ("hidden_size", "n_embd", "d_model"):
        if isinstance(fields.get(field), int):
            return int(fields[field])
    raise BadSpan(f"The config of {name} doesn't say its hidden size.")


def _spec_of(manifest: Manifest) -> str:
    if manifest.kind == "demo":
        return DEMO
    return f"{manifest.name}@{manifest.revision}" if manifest.revision else manifest.name


def _footprint(source: ModelSource, compute_class: ComputeClass) -> Footprint:
    parameters = stored_parameters(source.config, sum(file.size for file in source.weights))
    outside = outside_parameters(source.config, parameters)
    return footprint(
        source.blocks,
        parameters - outside,
        outside,
        compute_class.dtype,
        compute_class.quant,
        kv_values_of(source.config),
    )
