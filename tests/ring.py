"""Nodes of a ring in one process: real hosts on loopback, real devices, a planner that is told who serves what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from blocks.engine.inline import InlineDevice
from blocks.engine.runner import Runner
from blocks.engine.thread import DeviceThread
from blocks.model.head import Head, load_head
from blocks.model.identity import id_of
from blocks.model.source import ModelSource, resolve
from blocks.model.span import Span as LoadedSpan
from blocks.model.span import load_span
from blocks.protocol.admission import Grant, Wish
from blocks.protocol.device import LeaseKey
from blocks.protocol.hops import Hops, HopSettings
from blocks.protocol.session_errors import SessionFault
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from overlay.errors import DialError, PeerdError
from overlay.host import Host
from overlay.identity import Identity
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports
from overlay.rpc.types import Part
from overlay.transport.tcp import TcpTransport
from peerd.decoding import DecodeRequest, DecoderPool, DriverModel
from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock
from routing.types import ComputeClass, Hop, ModelId, Route, Span

KEY = "tiny"
CLASS = ComputeClass("none", "float32")


@cache
def _loaded_span(directory: Path, start: int, end: int) -> LoadedSpan:
    return load_span(resolve(str(directory)), start, end, prepare_steps=False)


@cache
def _loaded_head(directory: Path) -> Head:
    return load_head(resolve(str(directory)))


class MemoryStorage(dict[str, bytes]):
    """`overlay.ports.Storage` that forgets."""

    def load(self, name: str) -> bytes | None:
        return self.get(name)

    def save(self, name: str, data: bytes) -> None:
        self[name] = data


class Door:
    """Admission with switches; remembers what it granted."""

    def __init__(self, width: int, window_bytes: int = 8 << 20, windows: int = 8) -> None:
        self.width = width
        self.window_bytes = window_bytes
        self.windows = windows
        self.refuse_times = 0
        self.leases: list[LeaseKey] = []

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        if self.refuse_times > 0:
            self.refuse_times -= 1
            return SessionFault("busy", "no room for now", 0.05)
        self.leases.append(lease)
        return Grant(KEY, self.windows, self.window_bytes, 1 << 20, self.width, "float32")

    def release(self, lease: LeaseKey) -> None:
        self.leases.remove(lease)


@dataclass
class Node:
    """One node; ``span`` None serves nothing."""

    host: Host
    device: InlineDevice | DeviceThread
    hops: Hops
    service: SpanService
    directory: SessionDirectory
    door: Door
    span: Span | None
    stack: AsyncExitStack

    @property
    def peer(self) -> bytes:
        return self.host.peer_id.multihash

    def hop(self, start: int | None = None, end: int | None = None) -> Hop:
        assert self.span is not None
        span = Span(self.span.start if start is None else start, self.span.end if end is None else end)
        return Hop(self.peer, tuple(str(address.without_peer()) for address in self.host.addresses), span)

    def vanish(self) -> None:
        """Every connection breaks, and no new one is taken: what a killed process looks like from outside."""
        for connection in self.host.connections():
            connection.abort(DialError("gone"))
        self.host.unserve("/peerd/session/1")
        self.host.unserve("/peerd/data/1")


@dataclass
class Plans:
    """`Planner`: answers with the first of ``routes`` that avoids who is to be avoided."""

    routes: list[Route]
    blamed: list[tuple[bytes, str]] = field(default_factory=list)
    asked: int = 0
    error: PeerdError = field(default_factory=lambda: DialError("nobody serves the blocks"))

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        self.asked += 1
        for route in self.routes:
            if not any(hop.peer in avoid for hop in route.hops):
                return route
        raise self.error

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        self.blamed.append((peer, error.code))

    def praise(self, peers: Sequence[bytes]) -> None:
        """Nothing is held against anybody here."""

    async def wait_changed(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


class Listener:
    """Collects what it hears; ``on_count`` may act at a token and stops the decode by returning False."""

    def __init__(self, on_count: Callable[[int], bool | None] | None = None) -> None:
        self.tokens: list[int] = []
        self.logits: list[Part | None] = []
        self.waits: list[str] = []
        self.ends: list[tuple[str, PeerdError | None]] = []
        self.over = asyncio.Event()
        self._on_count = on_count

    def on_token(self, token: int, logits: Part | None) -> bool:
        self.tokens.append(token)
        self.logits.append(logits)
        return self._on_count is None or self._on_count(len(self.tokens)) is not False

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        self.waits.append(reason)

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        self.ends.append((reason, error))
        self.over.set()

    async def ended(self) -> str:
        await self.over.wait()
        assert len(self.ends) == 1
        return self.ends[0][0]


class Ring:
    """``async with Ring(directory) as ring``: makes nodes, a driver's pool and decodes."""

    def __init__(self, directory: Path | str, *, threads: bool = False, traced: bool = False) -> None:
        self.source: ModelSource = resolve(str(directory))
        self.width: int = self.source.config.get("hidden_size") or self.source.config["n_embd"]
        self._threads = threads
        self._traced = traced
        self._count = 0
        self._stack = AsyncExitStack()
        self.nodes: list[Node] = []

    async def __aenter__(self) -> Ring:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def node(self, start: int = 0, end: int = 0, *, drives: bool = False) -> Node:
        """A node that serves [start, end) (nothing when empty), with the head when it drives."""
        self._count += 1
        stack = await self._stack.enter_async_context(AsyncExitStack())
        clock = LoopClock()
        ports = Ports(clock, SystemWallClock(), SystemRandomness(), (TcpTransport(),), MemoryStorage())
        host = await stack.enter_async_context(Host(Identity(bytes(31) + bytes([self._count])), ports))
        await host.listen(Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))
        span = self._load_span(start, end) if end > start else None
        head = self._load_head() if drives else None
        device = await self._device(stack, span, head)
        door, directory = Door(self.width), SessionDirectory()
        hops = Hops(HopSettings(host.peer_id.multihash, SystemRandomness().token(16)), door, device)
        service = await stack.enter_async_context(SpanService(host, device, hops, directory, clock))
        node = Node(host, device, hops, service, directory, door, Span(start, end) if span else None, stack)
        self.nodes.append(node)
        return node

    def _load_span(self, start: int, end: int) -> LoadedSpan:
        if self._threads:  # a span is for one thread
            return load_span(self.source, start, end, prepare_steps=self._traced)
        return _loaded_span(self.source.directory, start, end)

    def _load_head(self) -> Head:
        return load_head(self.source) if self._threads else _loaded_head(self.source.directory)

    async def _device(
        self, stack: AsyncExitStack, span: LoadedSpan | None, head: Head | None
    ) -> InlineDevice | DeviceThread:
        def install(runner: Runner) -> None:
            if span is not None:
                runner.install_span(KEY, span)
            if head is not None:
                runner.install_head(KEY, head)

        if not self._threads:
            runner = Runner()
            install(runner)
            return InlineDevice(runner)
        device = DeviceThread(torch_threads=1)
        device.start()
        stack.callback(device.stop)
        await device.call(install)
        return device

    async def pool(self, driver: Node, plans: Plans) -> DecoderPool:
        """A pool at ``driver``, which ends before its node does."""
        pool = DecoderPool(
            driver.host, driver.service, driver.directory, driver.device, plans, LoopClock(), SystemRandomness(), 1
        )
        return await driver.stack.enter_async_context(pool)

    def model(self) -> DriverModel:
        config = self.source.config
        positions = config.get("max_position_embeddings") or config["n_positions"]
        return DriverModel(KEY, id_of(self.source), CLASS, self.width, positions)


def route(*hops: Hop) -> Route:
    """A route of these hops."""
    return Route(tuple(hops))


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Let the loop run until ``condition`` holds; fails the test after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0)


__all__ = ["KEY", "DecodeRequest", "Door", "Listener", "Node", "Plans", "Ring", "route", "until"]
