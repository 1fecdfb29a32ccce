"""Batches through all blocks and back over whole daemons, while servers of them are lost: outputs and gradients must always be the same.

Owns who asks for which batch, which server is struck while it has a call of it (`netsim.strikes`), and what is measured of it. What has to
come out is worked out by `netsim.arithmetic` in one place.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - the seeded generators that the world hands out
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from blocks.call_service import TENSORS_PROTOCOL
from blocks.protocol.device import Batch
from netsim.arithmetic import PRIME, Numbers, backward, forward, integers_of, part_of
from netsim.call_mischief import CELLS, LAST_COPY_S, CallMischief
from netsim.cells import CellCount
from netsim.metrics import Metrics
from netsim.online import sample_coverage, wait_online
from netsim.peers.node import NodePeer, NodeSettings
from netsim.sim_host import Machine
from netsim.strikes import STRIKES, Kinds, Strike, Striker
from netsim.world import HostDied, State, World
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from overlay.stream import Stream
from routing.types import Span

ASK_AGAIN_S = 0.5
LOOK_S = 0.02
"""Most calls of a batch take longer."""


@dataclass(frozen=True, slots=True)
class CallSettings:
    """The workload's part of a scenario.

    Attributes:
        batches: by each driver, one after the other: forward, then back.
        prompts: the share of batches with deep prompts; ``padding`` that with a mask.
        strikes: how servers are struck: in an order that is drawn, each once before any comes again; one for each batch. It hits a server
            that has a call of this driver just then, at a moment drawn from ``strike_at_s`` after the batch was asked for, or later, when
            there is one whose loss leaves no gap.
        copies: the share of calls of which a copy is made (`netsim.call_mischief`).
    """

    drivers: str = "driver"
    servers: str = "server"
    batches: int = 6
    rows: tuple[int, int] = (1, 24)
    tokens: tuple[int, int] = (16, 128)
    prompts: float = 0.5
    padding: float = 0.5
    wait_s: float = 60.0
    strikes: tuple[str, ...] = ()
    strike_at_s: tuple[float, float] = (0.0, 2.0)
    back_after_s: tuple[float, float] = (5.0, 30.0)
    ready_s: float = 120.0
    copies: float = 0.0

    def __post_init__(self) -> None:
        for name in self.strikes:
            if name not in STRIKES:
                raise ValueError(f"strikes: there is no {name!r}; there are {', '.join(sorted(STRIKES))}")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A batch, and the gradient of its output."""

    batch: Batch
    grad: Part


class Batches:
    """See the module."""

    SETTINGS: ClassVar[type[CallSettings]] = CallSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "batches.asked": "batches, each forward and back",
        "batches.done": "batches that came back",
        "batches.wrong": "batches whose output or gradients differ from the model's",
        "batches.failed": "batches that ended with an error",
        "tokens": "rows times tokens of batches that came back",
        "batch_s": "seconds of a batch that wasn't struck",
        "struck_batch_s": "seconds of a batch during which a server was struck",
        "strikes": "strikes on servers that had a call of the driver",
        "strikes.*": "the same by kind",
        "strikes.kinds": "kinds of strikes that happened, of those that were to",
        "servers_lost": "calls that lost their server",
        "copies": "copies of calls' messages that were made up and sent",
        "copies.server.*": "the same by cell, to servers",
        "copies.driver.*": "the same by cell, to drivers",
        "cells": "kinds of copies that were sent",
        "unasked": "calls that servers computed twice, or copies that they answered otherwise than docs/training.md, 3, says",
        "online_s": "seconds until every block was served",
        "coverage.*": "servers of a block that are online, over time",
        "coverage.min": "of the blocks, the fewest, over time",
    }

    def __init__(self, world: World, settings: CallSettings, metrics: Metrics) -> None:
        self.world = world
        self.settings = settings
        self.metrics = metrics
        for name in (
            "unasked",
            "batches.asked",
            "batches.done",
            "batches.wrong",
            "batches.failed",
            "tokens",
            "strikes",
            "strikes.kinds",
        ):
            metrics.count(name, 0)
        told = cast(NodeSettings, world.group(settings.servers)[0].settings)
        self.span, self.width = Span(0, told.blocks), told.width
        self.striker = Striker(world, settings.servers, told.blocks)
        self.kinds = Kinds(settings.strikes, world.random("kinds of strikes"))
        self._happened: dict[str, None] = {}
        metrics.owed_by("strikes.kinds", (f"strikes.{kind}" for kind in settings.strikes))

    async def run(self) -> None:
        """Wait for the swarm, and let every driver ask for its batches."""
        if not self.settings.copies:
            await self._run()
            return
        cells = CellCount(self.metrics, CELLS)
        draws = self.world.random("mischief")
        with CallMischief(self.world, draws, self.settings.copies, cells.copied, self._protest).entered():
            await self._run()

    def _protest(self, host: str, text: str) -> None:
        self.world.trace.add("unasked", host, text)
        self.metrics.count("unasked", of=host)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as background:
            samples = sample_coverage(self.world, self.striker, self.metrics)
            sampling = background.create_task(samples, name="sampling")
            await wait_online(self.world, self.striker, self.settings.drivers, self.metrics, self.settings.ready_s)
            self.metrics.owed_by("batches.done", (machine.name for machine in self.world.group(self.settings.drivers)))
            async with asyncio.TaskGroup() as asking:
                for machine in self.world.group(self.settings.drivers):
                    asking.create_task(self._drive(machine), name=f"{machine.name} asks")
            if self.settings.copies:
                await asyncio.sleep(LAST_COPY_S)
            lost = sum(cast(NodePeer, machine.peer).node.calls.servers_lost for machine in self._drivers_alive())
            self.metrics.put("servers_lost", lost)
            sampling.cancel()

    def _drivers_alive(self) -> list[Machine]:
        return [machine for machine in self.world.alive(self.settings.drivers) if machine.peer is not None]

    async def _drive(self, machine: Machine) -> None:
        draws = self.world.random(f"batches of {machine.name}")
        for _ in range(self.settings.batches):
            asked = self._batch(draws)
            self.metrics.count("batches.asked")
            struck = asyncio.ensure_future(self._strike(machine, draws))  # noqa: TID251 - awaited or cancelled below
            began_s = self.world.now_s
            try:
                peer = cast(NodePeer, machine.peer)
                work = peer.forward_and_back(asked.batch, asked.grad, wait_s=self.settings.wait_s)
                output, grads = await self.world.on(machine, work)
            except (PeerdError, HostDied) as error:
                self.world.trace.note(machine.name, f"no gradients: {error!r}")
                self.metrics.count("batches.failed", of=machine.name)
                self.metrics.count("batches.done", 0, of=machine.name)
            else:
                took_s = self.world.now_s - began_s
                is_struck = struck.done() and struck.result()
                self.metrics.observe("struck_batch_s" if is_struck else "batch_s", took_s, of=machine.name)
                self._compare(machine, asked, output, (grads.hidden, grads.prompts))
            struck.cancel()
            await asyncio.sleep(ASK_AGAIN_S)
        self.metrics.gave("batches.done", machine.name)

    def _batch(self, draws: random.Random) -> _Asked:
        settings = self.settings
        rows, tokens = draws.randint(*settings.rows), draws.randint(*settings.tokens)
        numbers = np.random.default_rng(draws.getrandbits(32))

        def made(*shape: int) -> Numbers:
            return numbers.integers(0, PRIME, shape)

        mask = positions = prompts = None
        if draws.random() < settings.padding:
            lengths = numbers.integers(1, tokens + 1, rows)
            kept = (np.arange(tokens)[None] < lengths[:, None]).astype(np.uint8)
            places = np.maximum(np.cumsum(kept, axis=1) - 1, 0).astype(np.int32)
            mask = Part("mask", "uint8", (rows, tokens), kept.tobytes())
            positions = Part("positions", "int32", (rows, tokens), places.tobytes())
        if draws.random() < settings.prompts:
            prompts = part_of(made(len(self.span), min(4, tokens), self.width), "prompts")
        batch = Batch(part_of(made(rows, tokens, self.width)), mask, positions, prompts)
        return _Asked(batch, part_of(made(rows, tokens, self.width), "grad"))

    async def _strike(self, driver: Machine, draws: random.Random) -> bool:
        """Strike a server that has a call of this driver; where there is none, or each would leave a gap, as soon as that has changed."""
        settings = self.settings
        if not settings.strikes:
            return False
        share, back_after_s = draws.random(), draws.uniform(*settings.back_after_s)
        await asyncio.sleep(draws.uniform(*settings.strike_at_s))
        while not self._strike_now(driver, share, back_after_s):  # noqa: ASYNC110 - virtual time is cheap, and no daemon tells of its calls
            await asyncio.sleep(LOOK_S)
        return True

    def _strike_now(self, driver: Machine, share: float, back_after_s: float) -> bool:
        targets = servers_of(self.world, driver, self.settings.servers)
        if not targets:
            return False
        kind = self.kinds.take()
        first = int(share * len(targets))
        for target in (*targets[first:], *targets[:first]):
            if self.striker.strike_one(target, driver, Strike(kind, 0, share, back_after_s)):
                self._note_strike(driver, target, kind)
                return True
        self.kinds.put_back(kind)
        return False

    def _note_strike(self, driver: Machine, target: Machine, kind: str) -> None:
        name = f"strikes.{kind}"
        self.world.trace.add("strike", target.name, f"{kind} during a call of {driver.name}")
        self._happened[kind] = None
        self.metrics.count("strikes")
        self.metrics.count(name)
        self.metrics.put("strikes.kinds", len(self._happened))
        self.metrics.gave("strikes.kinds", name)

    def _compare(self, machine: Machine, asked: _Asked, output: Part, grads: tuple[Part, Part | None]) -> None:
        expected = forward(self.span, asked.batch)
        of_hidden, of_prompts = backward(self.span, asked.batch, integers_of(asked.grad))
        right = (integers_of(output) == expected).all() and (integers_of(grads[0]) == of_hidden).all()
        if of_prompts is None or grads[1] is None:
            right = right and (of_prompts is None) == (grads[1] is None)
        else:
            right = right and (integers_of(grads[1]) == of_prompts).all()
        rows, tokens, _ = output.shape
        self.metrics.count("batches.done")
        self.metrics.count("tokens", rows * tokens)
        self.metrics.count("batches.wrong", int(not right), of="" if right else machine.name)
        self.world.trace.add("batch", machine.name, f"{rows} {tokens} {bool(right)}")


def servers_of(world: World, driver: Machine, servers: str) -> list[Machine]:
    """Who of the group ``servers`` runs and has a call of the driver just now: its stream lives at both ends.

    A driver's end alone may be all that is left of a call whose server has been restarted since.
    """
    return [machine for machine in world.group(servers) if _has_call(driver, machine) and _has_call(machine, driver)]


def _has_call(machine: Machine, other: Machine) -> bool:
    """Whether a stream of a call with ``other`` lives at ``machine``, as far as that knows."""
    if machine.state is not State.RUNNING or machine.peer is None or other.peer is None:
        return False
    remote = cast(NodePeer, other.peer).node.identity.peer_id
    connection = cast(NodePeer, machine.peer).host.connection(remote)
    streams = (lane.owner for lane in connection.session.live_lanes()) if connection is not None else ()
    return any(
        isinstance(stream, Stream) and stream.protocol == TENSORS_PROTOCOL and stream.error is None
        for stream in streams
    )


WORKLOADS = {"batches": Batches}
