"""Servers of tensor calls in one process: real hosts on loopback, real devices, and a planner that is told who serves what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blocks.call_service import TENSORS_PROTOCOL, CallService
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import Offer
from blocks.protocol.device import Batch, Device, Job, JobResult
from overlay.errors import DialError
from overlay.rpc.types import Part
from peerd.calls.caller import BatchCaller
from peerd.system_ports import LoopClock, SystemRandomness
from routing.records import SpanRecord, State
from routing.types import ModelId, Span
from tests.peerd.calls.swarm import Swarm
from tests.ring import CLASS, KEY, Node, Ring

PROMPT_TOKENS = 3


class GatedDevice:
    """Passes jobs on while it is open, and counts them; ``on_job`` hears of each before it is passed on."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.jobs: list[Job] = []
        self.held: list[tuple[Job, Callable[[JobResult], None]]] = []
        self.is_open = True
        self.on_job: Callable[[Job], None] = lambda job: None

    @property
    def step_count(self) -> int:
        return self._device.step_count

    @property
    def queue_depth(self) -> int:
        return self._device.queue_depth

    def submit(self, jobs: Sequence[Job], done: Callable[[JobResult], None]) -> None:
        for job in jobs:
            self.jobs.append(job)
            self.on_job(job)
            if self.is_open:
                self._device.submit((job,), done)
            else:
                self.held.append((job, done))

    def open(self) -> None:
        self.is_open = True
        held, self.held = self.held, []
        for job, done in held:
            self._device.submit((job,), done)


@dataclass
class Server:
    """One node that answers calls."""

    node: Node
    device: GatedDevice
    service: CallService
    record: SpanRecord

    @property
    def peer(self) -> bytes:
        return self.node.peer

    def vanish(self) -> None:
        """What a killed process looks like from outside."""
        self.node.host.unserve(TENSORS_PROTOCOL)
        for connection in self.node.host.connections():
            connection.abort(DialError("gone"))


class Field:
    """``async with Field(directory, blocks) as field``: servers, a swarm, and a caller that serves nothing."""

    def __init__(self, directory: Path, blocks: int) -> None:
        self._ring = Ring(directory)
        self.model = self._ring.model()
        self.width = self._ring.width
        self.swarm = Swarm(blocks)
        self.servers: list[Server] = []

    async def __aenter__(self) -> Field:
        await self._ring.__aenter__()
        node = await self._ring.node()
        self.client = node
        service = CallService(node.host, node.device, _offers_nothing, LoopClock())
        self.caller = BatchCaller(node.host, service, self.swarm, LoopClock(), SystemRandomness())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._ring.__aexit__(*error)

    async def server(self, start: int, end: int, *, listed: bool = True) -> Server:
        """A server of blocks [start, end); ``listed`` ones are known to the swarm."""
        node = await self._ring.node(start, end)
        device = GatedDevice(node.device)
        offer = Offer(KEY, Span(start, end), self.width, "float32", self.model.max_positions)
        service = CallService(node.host, device, self._offers(offer), LoopClock())
        hop = node.hop()
        record = SpanRecord(
            node.peer, hop.addresses, self.model.model, Span(start, end), State.ONLINE, CLASS, prefill_s=0.001
        )
        server = Server(node, device, service, record)
        self.servers.append(server)
        if listed:
            self.swarm.records.append(record)
        return server

    def _offers(self, offer: Offer) -> Callable[[ModelId, str], Offer]:
        def find(model: ModelId, compute_class: str) -> Offer:
            if model != self.model.model:
                raise CallFault("not-served", "another model")
            if compute_class != str(CLASS):
                raise CallFault("wrong-class", "another class")
            return offer

        return find

    def unlist(self, server: Server) -> None:
        self.swarm.records.remove(server.record)

    def batch(self, rows: int = 5, tokens: int = 7, *, prompts: int = 0, seed: int = 0) -> Batch:
        """Ragged rows, padded on the right; with deep prompts for ``prompts`` blocks."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn((rows, tokens, self.width), generator=generator)
        mask = torch.ones((rows, tokens), dtype=torch.uint8)
        for row in range(rows):
            mask[row, tokens - row % tokens :] = 0
        deep = torch.randn((prompts, PROMPT_TOKENS, self.width), generator=generator) if prompts else None
        return Batch(
            part_of("hidden", hidden), part_of("mask", mask), None, None if deep is None else part_of("prompts", deep)
        )

    def grad(self, batch: Batch) -> Part:
        values = torch.randn(batch.hidden.shape, generator=torch.Generator().manual_seed(9))
        return part_of("grad", values)


def part_of(name: str, tensor: torch.Tensor) -> Part:
    dtype = {torch.float32: "float32", torch.uint8: "uint8", torch.int32: "int32"}[tensor.dtype]
    return Part(name, dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())


def _offers_nothing(model: ModelId, compute_class: str) -> Offer:
    raise CallFault("not-served", "this node serves nothing")


def data(part: Part | None) -> bytes:
    assert part is not None
    return bytes(part.data)
