"""Garbage at every layer, from dialled and dialling strangers, at a host that goes on serving others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.metrics import Metrics
from netsim.peers.bare import BarePeer
from netsim.peers.garbler import GarblerPeer, Layer
from netsim.workloads import Scene
from netsim.workloads.streams import one_of, ready
from netsim.world import Machine, World
from overlay.errors import DialError, PeerdError

LAYERS_THAT_END = (Layer.FIRST_WRITE, Layer.SECOND_WRITE, Layer.SEALED)
"""Beyond them, some of what is drawn is legal."""
QUIET_S = 45.0
"""So long after the last attack nothing of any may be left: idle connections live for 35 s."""


@dataclass(frozen=True, slots=True)
class GarbageSettings:
    """Each host of ``garblers`` attacks so often, once every ``every_s``; and the victim dials each of them so often."""

    victim: str = "hop"
    asker: str = "driver"
    garblers: str = "stranger"
    attacks: int = 12
    every_s: float = 1.0
    ask_every_s: float = 0.1


class Garbage(Scene[GarbageSettings]):
    """Typed ends, nothing raises through, and others are served meanwhile."""

    SETTINGS: ClassVar[type[GarbageSettings]] = GarbageSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "attacks": "connections on which garbage was sent",
        "refused": "attacks that were refused before they said anything",
        "borne": "attacks with what can't be anything that weren't thrown out",
        "ended_s": "seconds until such an attack was thrown out",
        "dials": "of the victim, to those who answer garbage",
        "dials.failed": "which ended with a typed error",
        "dials.untyped": "which ended with any other exception",
        "asked": "questions of an honest peer meanwhile",
        "answered": "of these, rightly",
        "unanswered": "of these, wrongly, or with an error",
        "answer_s": "seconds of an answer",
        "left.connections": "of strangers at the victim, long after",
        "left.upgrading": "handshakes at the victim, long after",
        "left.lanes": "lanes at the victim, long after",
    }

    COUNTED = (
        "attacks", "refused", "borne", "dials", "dials.failed", "dials.untyped", "asked", "answered", "unanswered",
    )  # fmt: skip

    def __init__(self, world: World, settings: GarbageSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        metrics.expect("ended_s")

    async def run(self) -> None:
        world, told = self._world, self._settings
        strangers = list(world.group(told.garblers))
        victim, asker = one_of(world, told.victim), one_of(world, told.asker)
        (target, honest) = await ready(world, (victim, asker))
        await ready(world, strangers)
        asking = world.loop.create_task(self._ask(asker, honest, target), name="asking")
        async with asyncio.TaskGroup() as tasks:
            for number, stranger in enumerate(strangers):
                tasks.create_task(self._attack(stranger, target, number), name=f"{stranger.name} attacks")
            tasks.create_task(self._dial(victim, target, strangers), name="dialling strangers")
        await asyncio.sleep(QUIET_S)
        asking.cancel()
        await asyncio.wait((asking,))
        overlay = target.overlay
        known = [found for found in overlay.connections() if found.remote_peer != honest.peer_id]
        self._metrics.put("left.connections", len(known))
        self._metrics.put("left.upgrading", len(overlay._upgrading))
        self._metrics.put("left.lanes", sum(len(found.session.lanes) for found in known))

    async def _attack(self, stranger: Machine, target: BarePeer, number: int) -> None:
        peer = cast(GarblerPeer, stranger.peer)
        for turn in range(self._settings.attacks):
            layer = Layer((number + turn) % len(Layer))
            self._metrics.count("attacks")
            try:
                ended_s = await self._world.on(stranger, peer.attack(target.peer_id, target.addresses[0], layer))
            except DialError:
                self._metrics.count("refused")
                continue
            self._world.trace.add("attack", stranger.name, f"{layer.name} {ended_s}")
            if layer in LAYERS_THAT_END:
                if ended_s is None:
                    self._metrics.count("borne", of=stranger.name)
                else:
                    self._metrics.observe("ended_s", ended_s, of=stranger.name)
            await asyncio.sleep(self._settings.every_s)

    async def _dial(self, victim: Machine, target: BarePeer, strangers: list[Machine]) -> None:
        for turn in range(self._settings.attacks):
            for stranger in strangers:
                peer = cast(GarblerPeer, stranger.peer)
                expected = peer.peer_id if turn % 2 else None
                self._metrics.count("dials")
                try:
                    await self._world.on(victim, target.overlay.connect(expected, peer.addresses))
                except PeerdError:
                    self._metrics.count("dials.failed")
                except Exception as error:  # noqa: BLE001 - to find such is what this is for
                    self._metrics.count("dials.untyped", of=victim.name)
                    self._world.trace.note(victim.name, f"untyped: {error!r}")
                await asyncio.sleep(self._settings.every_s / len(strangers))

    async def _ask(self, asker: Machine, honest: BarePeer, target: BarePeer) -> None:
        while True:
            began_s = self._world.now_s
            self._metrics.count("asked")
            try:
                is_right = await self._world.on(asker, honest.call(target, 200))
                self._metrics.count("answered" if is_right else "unanswered", of="" if is_right else asker.name)
                self._metrics.observe("answer_s", self._world.now_s - began_s, of=asker.name)
            except PeerdError as error:
                self._metrics.count("unanswered", of=asker.name)
                self._world.trace.note(asker.name, f"no answer: {error}")
            await asyncio.sleep(self._settings.ask_every_s)


WORKLOADS = {"layers": Garbage}
