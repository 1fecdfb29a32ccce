"""The composition root: everything that a daemon is, put together once, for `peerd/__main__` and the simulator alike.

Owns the order in which parts start and stop, the join of the network, and the view that the local API has of it all
(`peerd.local_api.node_view.NodeView`). Decides nothing that a part could decide. Imports no torch: models load in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from blocks.call_service import CallService
from blocks.protocol.device import OwnDevice
from blocks.protocol.hops import Hops, HopSettings
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.connection import Connection
from overlay.dht.node import Dht, DhtConfig
from overlay.errors import Blame, PeerdError
from overlay.host import Host, HostConfig, Secure, secure_with_noise
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports, Randomness, Storage, WallClock
from overlay.transport.tcp import ListenError
from peerd.adapters.adapter import shape_of
from peerd.adapters.store import AdapterStore
from peerd.announcer import Announcer
from peerd.calls.caller import BatchCaller
from peerd.client.tensor_body import Tensor
from peerd.config import AUTO, Config
from peerd.decoding import Decode, DecodeListener, DecodeRequest, DecoderPool
from peerd.driving import RouteWish
from peerd.generation import Stopping, TextModel
from peerd.hidden_sessions import HiddenSession, HiddenSessions
from peerd.loading import ModelLoader, TorchLoader
from peerd.local_api.node_view import BlockModel, HopView, ServedModel, ServerView, SessionView, Status, SwarmModel
from peerd.local_api.server import serving
from peerd.metrics import Metrics
from peerd.models import Drivable, ModelHost
from peerd.store import (
    StateError,
    load_known_peers,
    load_port,
    next_incarnation,
    save_known_peers,
    save_port,
)
from peerd.swarm import KnownModel, Swarm, UnknownModel
from peerd.training.jobs import Jobs
from peerd.training.run import TrainedModel
from peerd.training.workshop import NodeWorkshop
from peerd.version import VERSION

log = logging.getLogger(__name__)

DRAIN_S = 30.0
JOIN_RETRY_MIN_S = 1.0
JOIN_RETRY_MAX_S = 30.0
SAVE_PEERS_S = 60.0
BOOT_ID_BYTES = 16
PLACE_UNSEEN_S = 15.0
"""How long ``--serve-blocks auto`` waits for its network; after that it serves what it would serve alone."""


class ModelPending(PeerdError):
    """The model isn't known, but may soon be: this node still joins its network, or loads what it is to serve."""

    code = "model-pending"
    exit_code = 52
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


Ready = Callable[["Node"], None]
Serve = Callable[["Node"], AbstractAsyncContextManager[None]]
"""Answers people for as long as it is entered."""


def on_its_socket(node: Node) -> AbstractAsyncContextManager[None]:
    """The local API, on the socket of the configuration."""
    return serving(node, node.config.paths.socket)


class Node:
    """One daemon. `run` is its life; everything else is for the local API.

    ``loader`` brings models onto ``device`` (None: from files, with torch), ``serve`` lets people in, ``secure`` makes connections
    secure; the simulator hands over its own.
    """

    def __init__(
        self,
        config: Config,
        ports: Ports,
        storage: Storage,
        device: OwnDevice,
        loader: ModelLoader | None = None,
        serve: Serve = on_its_socket,
        secure: Secure = secure_with_noise,
    ) -> None:
        self.config = config
        self.wall_clock: WallClock = ports.wall_clock
        self.randomness: Randomness = ports.randomness
        self._ports = ports
        self._storage = storage
        self._device = device
        self._serve_people = serve
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._draining = False
        self._joined = asyncio.Event()
        self._serving = False
        self.identity = Identity.load_or_create(storage, ports.randomness)
        self.metrics = Metrics(VERSION, str(self.identity.peer_id))
        self._host = Host(self.identity, ports, HostConfig(agent=f"peerd/{VERSION}"), secure=secure)
        self._dht = Dht(self._host, ports, DhtConfig())
        self._swarm = Swarm(self._host, self._dht, ports.clock, ports.randomness)
        self._host.add_connection_listener(lambda opened: None, self._hung_up)
        self._announcer = Announcer(self._host, self._dht, self._swarm, ports.clock)
        cache_dir = config.paths.state_dir / "cache"
        loader = loader or TorchLoader(config.serving.device, device, cache_dir)
        self._models = ModelHost(
            config, self._host, self._swarm, self._announcer, device, loader, ports.clock, cache_dir
        )
        settings = HopSettings(self.identity.peer_id.multihash, ports.randomness.token(BOOT_ID_BYTES))
        self._hops = Hops(settings, self._models.admission, device)
        self._models.admission.hops = self._hops
        self._directory = SessionDirectory()
        touch = self._models.admission.touch
        self._service = SpanService(self._host, device, self._hops, self._directory, ports.clock, lease_used=touch)
        self._call_service = CallService(self._host, device, self._models.admission.offer, ports.clock)
        self.calls = BatchCaller(self._host, self._call_service, self._swarm, ports.clock, ports.randomness)
        self._pool: DecoderPool | None = None
        self.hidden_sessions = HiddenSessions()
        self.adapters = AdapterStore(config.paths.state_dir / "adapters")
        workshop = NodeWorkshop(ports.clock, device, self.calls, self._open_trained, self.adapters)
        self.jobs = Jobs(config.paths.state_dir / "jobs", workshop, ports.wall_clock)

    # --- life ---

    async def run(self, ready: Ready) -> None:
        """From start to the end of a graceful stop. Raises the PeerdError that keeps the daemon from starting or serving."""
        incarnation = next_incarnation(self._storage)
        try:
            async with AsyncExitStack() as stack:
                self.adapters.recover()
                self.jobs.load()
                await stack.enter_async_context(self._serve_people(self))
                await stack.enter_async_context(self._host)
                await self._listen()
                # Only now: a start that fails at its socket or port ends at once, without waiting for torch's import.
                self._device.start()
                await stack.enter_async_context(self._dht)
                await stack.enter_async_context(self._service)
                self._pool = await stack.enter_async_context(
                    DecoderPool(
                        self._host, self._service, self._directory, self._device, self._swarm,
                        self._ports.clock, self._ports.randomness, incarnation,
                    )
                )  # fmt: skip
                stack.callback(self.hidden_sessions.close_all, _stopping())
                self._watch()
                ready(self)
                await self._live()
                await self._leave()
        finally:
            self._models.close()
            self._device.stop()

    async def _live(self) -> None:
        """Background work until somebody asks to stop; the first part that can't go on ends it with its error."""
        join = self.config.network.join or load_known_peers(self._storage)
        new_network = not join
        if new_network:
            self._joined.set()
        async with AsyncExitStack() as stack:
            tasks: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(work)  # noqa: TID251 - owned here, and always awaited below
                for work in (
                    self._stop.wait(),
                    self._swarm.run(),
                    self._join(tuple(Multiaddr.parse(text) for text in join)),
                    self._serve(new_network=new_network),
                    self._remember_peers(),
                    self._announcer.keep_told(self._models.measure),
                    self.jobs.run(),
                )
            ]
            stack.push_async_callback(_cancel_all, tasks)
            stopping, endless = tasks[0], set(tasks[1:])
            while not stopping.done():
                done, _ = await asyncio.wait({stopping, *endless}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & endless:
                    endless.discard(task)
                    task.result()

    async def _serve(self, *, new_network: bool) -> None:
        if self.config.serving.blocks == AUTO:  # which blocks are weakest is for the network to say
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PLACE_UNSEEN_S):
                    await self._joined.wait()
        await self._models.serve_configured(new_network=new_network)
        self._serving = True

    async def _listen(self) -> None:
        """The addresses that were given, or all interfaces on a port chosen once and kept."""
        if self.config.network.listen:
            for text in self.config.network.listen:
                await self._host.listen(Multiaddr.parse(text))
            return
        listened = await self._host.listen(Multiaddr.parse(f"/ip4/0.0.0.0/tcp/{load_port(self._storage)}"))
        port = listened[0].port or 0
        save_port(self._storage, port)
        try:
            await self._host.listen(Multiaddr.parse(f"/ip6/::/tcp/{port}"))
        except ListenError as error:
            log.debug("no IPv6 here: %s", error)

    async def _join(self, addresses: tuple[Multiaddr, ...]) -> None:
        """Meet the network; warns once, and tries until somebody answers."""
        own = str(self.identity.peer_id)
        others = tuple(address for address in addresses if address.get("p2p") != own)
        if not others:
            self._joined.set()
            return
        delay_s = JOIN_RETRY_MIN_S
        warned = False
        meetings = [
            (None, (address,)) if (named := address.get("p2p")) is None else (PeerId.from_text(named), (address,))
            for address in others
        ]
        while not await self._dht.bootstrap(meetings):
            if not warned:
                log.warning("none of %d known peers answers yet; trying until one does", len(others))
                warned = True
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, JOIN_RETRY_MAX_S)
        self._joined.set()
        self._save_peers()  # now, so that a daemon that is killed young finds its network again
        self._swarm.look_now()
        log.info("joined the network")

    def _hung_up(self, connection: Connection) -> None:
        if not connection.was_left or connection.session.remote_gone:  # what this side left for being idle is no news
            self._swarm.hung_up(connection.remote_peer.multihash)

    async def _remember_peers(self) -> None:
        while True:
            await asyncio.sleep(SAVE_PEERS_S)
            self._save_peers()

    def _save_peers(self) -> None:
        known = [
            str(address.with_peer(str(peer)))
            for peer, addresses in self._dht.known_peers()
            for address in addresses[:2]
        ]
        if not known:
            return
        try:
            save_known_peers(self._storage, known)
        except StateError as error:  # a disk that is full for a while must not end a daemon that serves
            log.warning("The known peers could not be saved: %s", error)

    async def _leave(self) -> None:
        """Drain: no new sessions, records withdrawn, drivers told; a second request to stop skips the waiting."""
        self._draining = True
        self._save_peers()
        self._models.drain()
        self._call_service.draining = True
        for decode in self._pool.running() if self._pool is not None else ():
            decode.cancel()
        self.hidden_sessions.close_all(_stopping())
        drain = asyncio.ensure_future(self._service.drain(DRAIN_S))  # noqa: TID251 - awaited two lines down
        now = asyncio.ensure_future(self._stop_now.wait())  # noqa: TID251 - likewise
        await asyncio.wait({drain, now}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel_all([drain, now])
        try:
            async with asyncio.timeout(2.0):
                await self._announcer.withdraw()
        except TimeoutError:
            log.debug("the records could not be withdrawn in time; they expire by themselves")

    def request_stop(self) -> None:
        """Stop gracefully; the second time, at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    # --- what people see ---

    def addresses(self) -> tuple[Multiaddr, ...]:
        """Full addresses, the ones that others can use first."""
        return self._host.addresses

    def status(self) -> Status:
        state = "draining" if self._draining else "online" if self._joined.is_set() else "joining"
        served = tuple(
            ServedModel(found.model.hex(), found.name, found.record.span, found.record.state.value, found.progress)
            for found in self._models.served()
        )
        decodes = self._pool.running() if self._pool is not None else ()
        sessions = [self._session_view(decode, len(decode.output)) for decode in decodes]
        sessions += [self._session_view(hidden, hidden.length) for hidden in self.hidden_sessions.running()]
        return Status(
            str(self.identity.peer_id),
            VERSION,
            state,
            tuple(map(str, self._host.addresses)),
            served,
            tuple(sessions),
        )

    def _session_view(self, session: Decode | HiddenSession, tokens: int) -> SessionView:
        hops = session.route.hops if session.route is not None else ()
        views = tuple(HopView(str(PeerId.from_bytes(hop.peer)), hop.span) for hop in hops)
        name = self._swarm.name_of(session.model.model)
        return SessionView(session.session.hex(), name, views, tokens, session.replays)

    def swarm(self) -> tuple[SwarmModel, ...]:
        self._swarm.stay_fresh()
        own = self.identity.peer_id.multihash
        models = []
        for known in self._swarm.models():
            model = known.manifest.model
            servers = tuple(
                ServerView(str(PeerId.from_bytes(found.peer)), found.span, found.state.value, found.peer == own)
                for found in self._swarm.view(model).servers
            )
            compute_class = self._swarm.compute_class_of(model) or known.manifest.compute
            models.append(
                SwarmModel(model.hex(), self._swarm.name_of(model), known.blocks, str(compute_class), servers)
            )
        return tuple(sorted(models, key=lambda found: (found.name, found.model_id)))

    async def open_model(self, name: str | None) -> TextModel:
        """See `NodeView.open_model`."""
        known = await self._find(name)
        drivable = await self._models.drivable(known)
        name = self._swarm.name_of(known.manifest.model)
        return TextModel(
            name,
            drivable.codec,
            drivable.driver.max_positions,
            functools.partial(self._start, drivable),
            shape_of(name, known.blocks, known.manifest.config, drivable.driver),
        )

    async def _open_trained(self, name: str | None) -> TrainedModel:
        """What a training job needs of a model. Raises as `open_model`."""
        known = await self._find(name)
        drivable = await self._models.drivable(known)
        model_name = self._swarm.name_of(known.manifest.model)
        shape = shape_of(model_name, known.blocks, known.manifest.config, drivable.driver)
        return TrainedModel(shape, drivable.driver, drivable.codec)

    async def block_model(self, name: str | None) -> BlockModel:
        """See `NodeView.block_model`."""
        known = await self._find(name)
        model = known.manifest.model
        driver = await self._models.described(known)
        return BlockModel(self._swarm.name_of(model), known.blocks, known.manifest.config, driver)

    def open_session(self, wish: RouteWish) -> HiddenSession:
        """See `NodeView.open_session`."""
        assert self._pool is not None, "a model is only found once the pool is open"
        if self._draining:
            raise _stopping()
        return self.hidden_sessions.open(self._pool.around, wish)

    async def outside_tensors(self, name: str | None) -> dict[str, Tensor]:
        """See `NodeView.outside_tensors`."""
        return await self._models.outside(await self._find(name))

    async def _find(self, name: str | None) -> KnownModel:
        try:
            known = self._swarm.resolve_name(name)
        except PeerdError:
            await self._swarm.refresh()
            known = self._resolve(name)
        await self._swarm.freshen(known.manifest.model)
        return known

    def _resolve(self, name: str | None) -> KnownModel:
        try:
            return self._swarm.resolve_name(name)
        except UnknownModel as error:
            if self._joined.is_set() and self._serving:
                raise
            doing = "loads its models" if self._joined.is_set() else "looks for its network"
            raise ModelPending(f"{error} This daemon still {doing}.") from error

    def _start(self, drivable: Drivable, request: DecodeRequest, listener: DecodeListener) -> Decode:
        assert self._pool is not None
        return self._pool.start(drivable.driver, request, listener)

    def _watch(self) -> None:
        metrics, device, hops, dht = self.metrics, self._device, self._hops, self._dht
        metrics.watch("sessions_served", "Sessions that hold KV here.", lambda: hops.session_count)
        metrics.watch("windows_done", "Windows computed here.", lambda: hops.statistics().windows_done)
        metrics.watch("device_queue", "Jobs waiting for the device.", lambda: device.queue_depth)
        metrics.watch("device_jobs_done", "Jobs that the device has done.", lambda: device.step_count)
        metrics.watch("connections", "Peers connected.", lambda: len(self._host.connections()))
        metrics.watch("dht_contacts", "Contacts in the routing table.", lambda: len(dht.known_peers()))
        metrics.watch("kv_bytes", "KV memory reserved.", lambda: self._models.admission.budget.used_bytes)


async def _cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _stopping() -> Stopping:
    return Stopping("The daemon is stopping; ask another one, or again when it is back.")
