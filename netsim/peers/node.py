"""A whole daemon on a simulated machine: `peerd.node.Node`, unmodified, with a device and a model that are simulated.

Owns the configuration that a scenario's settings stand for, and what a workload may ask of a daemon: a text, or a batch forward and back.
It asks as the local API does, one layer below HTTP. Must not know what is measured.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from blocks.engine.errors import ComputeFailed
from blocks.model.identity import id_of
from blocks.model.source import DEMO, ModelSource
from blocks.protocol.device import Batch, ReleaseJob
from blocks.sampling_params import SamplingParams
from netsim.arithmetic import Arithmetic, ArithmeticRunner, BlankRunner
from netsim.compute import DEVICES
from netsim.devices import JobRunner, SimDevice
from netsim.null_channel import null_channel
from netsim.sim_host import LISTEN_PORT, SimHost
from netsim.synthetic import NOWHERE, SyntheticLoader, synthetic_source
from overlay.host import Host, secure_with_noise
from overlay.rpc.types import Part
from peerd.calls.caller import Gradients
from peerd.config import AUTO, NONE, Config, Network, Paths, Serving
from peerd.generation import Delta, Done, Generation, GenerationRequest, Waiting
from peerd.loading import ModelLoader, TorchLoader
from peerd.local_api.node_view import Status, SwarmModel
from peerd.node import Node
from routing.records import State
from routing.types import Span

OnTokens = Callable[[int], None]
ARITHMETIC, BLANK, TORCH = "arithmetic", "blank", "torch"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What runs, and on what machine.

    Attributes:
        join: groups of hosts, or hosts, that it is told of; of a group of its own, the others.
        serve: ``auto``, ``none`` or a span like ``0:4``.
        model: its name; the simulated one has ``blocks`` blocks of ``block_bytes`` and boundaries of ``width`` float32.
        numbers: what computes: ``arithmetic`` (exact), ``blank`` (zeros) or ``torch`` (the demo model itself).
        device: a class of `netsim.compute.DEVICES`.
    """

    join: tuple[str, ...] = ()
    serve: str = AUTO
    model: str = DEMO
    blocks: int = 12
    width: int = 16
    block_bytes: int = 50_000_000
    numbers: str = ARITHMETIC
    device: str = "demo-cpu"
    memory_bytes: int = 8 << 30
    max_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking for a text.

    Attributes:
        token_at_s: when each piece of the answer was taken, on the loop's clock; with the number of tokens in it.
        waits: the reasons of the pauses that the asker was told of, in order.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    replays: int
    token_at_s: tuple[tuple[float, int], ...]
    waits: tuple[str, ...]
    session: str

    def longest_pause_s(self) -> float:
        """Between two pieces of the answer."""
        times = [at for at, _ in self.token_at_s]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class NodePeer:
    """`netsim.peers.Peer`; ``node`` is the daemon, ``device`` what it computes with."""

    SETTINGS = NodeSettings

    def __init__(self, host: SimHost, settings: NodeSettings) -> None:
        self._host = host
        self.settings = settings
        self.source = _source_of(settings.model, settings.blocks, settings.width, settings.block_bytes)
        self.device = SimDevice(DEVICES[settings.device], _runner_of(settings), host.condition)
        self.is_ready = asyncio.Event()
        config = _config_of(host, settings)
        secure = secure_with_noise if host.world.is_noise else null_channel
        loader = self._loader(config)
        self.node = Node(config, host.ports, host.storage, self.device, loader, _without_socket, secure)

    def _loader(self, config: Config) -> ModelLoader:
        if self.settings.numbers == TORCH:
            return TorchLoader("cpu", self.device, config.paths.state_dir / "cache")
        return SyntheticLoader({self.settings.model: self.source}, self.device, self.settings.memory_bytes)

    async def run(self) -> None:
        """The daemon's life."""
        await self.node.run(lambda _: self.is_ready.set())

    def request_stop(self) -> None:
        """As a signal would."""
        self.node.request_stop()

    # --- what a workload may ask; run it in the host's context ---

    def status(self) -> Status:
        """What `peerctl status` shows."""
        return self.node.status()

    def serves(self) -> Span | None:
        """The blocks that it serves now."""
        return next((model.span for model in self.status().models if model.state == "online"), None)

    def swarm(self) -> tuple[SwarmModel, ...]:
        """What `peerctl swarm` shows: as this daemon sees it, and looking makes it look."""
        return self.node.swarm()

    def servers_known(self) -> frozenset[bytes]:
        """Peer ids of the servers of its model that this daemon knows of, those that load too; looks at nothing anew."""
        view = self.node._swarm.view(id_of(self.source))
        return frozenset(server.peer for server in view.servers if server.state is not State.DRAINING)

    def gauge(self, name: str) -> float:
        """One of the daemon's metrics, without its ``peerd_``."""
        return self.node.metrics.registry.get_sample_value(f"peerd_{name}") or 0.0

    @property
    def host(self) -> Host:
        """What the daemon speaks through."""
        return self.node._host

    def forget_kv(self) -> None:
        """Take back all KV, as admission does with what is idle (`peerd.admission`)."""
        hops = self.node._models.admission.hops
        assert hops is not None
        for lease in self.device.leases:
            self.device.submit((ReleaseJob(lease),), lambda result: None)
            hops.lease_dropped(lease)

    async def generate(
        self, prompt: tuple[int, ...], count: int, *, wait_s: float = 60.0, on_tokens: OnTokens | None = None
    ) -> Answer:
        """A text of ``count`` tokens; ``on_tokens`` hears how many there are by now. Raises PeerdError as the local API would answer."""
        loop = asyncio.get_running_loop()
        model = await self.node.open_model(self.settings.model)
        request = GenerationRequest(prompt, SamplingParams(), count, ignore_eos=True, wait_s=wait_s)
        ids: list[int] = []
        text: list[str] = []
        times: list[tuple[float, int]] = []
        waits: list[str] = []
        async with Generation(model, request, prompt) as generation:
            session = generation.session.hex()
            self._host.trace("session", f"asked {len(prompt)} {count}", session)
            async for event in generation:
                if isinstance(event, Delta):
                    ids += event.token_ids
                    text.append(event.text)
                    if event.token_ids:
                        times.append((loop.time(), len(event.token_ids)))
                        if on_tokens is not None:
                            on_tokens(len(ids))
                        self._host.trace("session", f"tokens {' '.join(map(str, event.token_ids))}", session)
                elif isinstance(event, Waiting):
                    waits.append(event.reason)
                    self._host.trace("session", f"waits {event.reason}", session)
                elif isinstance(event, Done):
                    self._host.trace("session", f"done {event.finish_reason} {event.replays}", session)
                    told = (event.finish_reason, event.replays, tuple(times), tuple(waits), session)
                    return Answer(tuple(ids), "".join(text), *told)
        raise AssertionError("a generation ends with Done or raises")

    async def forward_and_back(self, batch: Batch, grad: Part, *, wait_s: float = 60.0) -> tuple[Part, Gradients]:
        """A batch through every block, and its gradients."""
        model = await self.node.block_model(self.settings.model)
        span = Span(0, model.blocks)
        output, tape = await self.node.calls.forward(model.driver, span, batch, keep_tape=True, wait_s=wait_s)
        assert tape is not None
        return output, await self.node.calls.backward(model.driver, span, tape, grad, wait_s=wait_s)


def _without_socket(node: Node) -> AbstractAsyncContextManager[None]:
    """aiohttp needs real sockets: a workload calls what lies below it."""
    return nullcontext()


@functools.cache
def _source_of(name: str, blocks: int, width: int, block_bytes: int) -> ModelSource:
    return synthetic_source(name, blocks, width, block_bytes)


def _runner_of(settings: NodeSettings) -> JobRunner:
    if settings.numbers == ARITHMETIC:
        return ArithmeticRunner(Arithmetic(settings.blocks, settings.width))
    if settings.numbers == BLANK:
        return BlankRunner(settings.width)
    if settings.numbers != TORCH:
        raise ComputeFailed(f"numbers is {ARITHMETIC}, {BLANK} or {TORCH}, not {settings.numbers!r}")
    use_no_threads()
    from blocks.engine.runner import Runner

    return Runner()


def use_no_threads() -> None:
    """Have torch compute, and transformers read weights, in the thread that asks."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # noqa: TID251 - the one way to say it
    from blocks.model.exact import use_one_thread

    use_one_thread()


def _config_of(host: SimHost, settings: NodeSettings) -> Config:
    serve: str | Span = settings.serve
    if settings.serve not in (AUTO, NONE):
        start, _, end = settings.serve.partition(":")
        serve = Span(int(start), int(end))
    return Config(
        Paths(host.directory, NOWHERE / "socket"),
        Network(_addresses(host, settings.join), (str(host.listen_address),)),
        Serving((settings.model,), serve, "cpu", "float32", max_blocks=settings.max_blocks),
    )


def _addresses(host: SimHost, join: tuple[str, ...]) -> tuple[str, ...]:
    """Of whom it is told, without itself."""
    machines = host.world.machines
    told = [machine for name in join for machine in ([machines[name]] if name in machines else host.world.group(name))]
    return tuple(f"/ip4/{machine.address}/tcp/{LISTEN_PORT}" for machine in told if machine.name != host.name)


PEER = NodePeer
