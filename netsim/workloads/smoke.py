"""The smallest workload: peers of kind `echo` ask each other, and what comes back is compared. Shows that the simulator itself works."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.metrics import Metrics
from netsim.peers.echo import EchoPeer
from netsim.sim_host import LISTEN_PORT
from netsim.world import HostDied, Machine, World
from overlay.errors import DialError
from overlay.multiaddr import tcp_address


@dataclass(frozen=True, slots=True)
class EchoSettings:
    """The workload's part of a scenario."""

    asks_per_s: float = 10.0
    bytes_max: int = 20_000
    timeout_s: float = 10.0
    sample_s: float = 1.0


class Echo:
    """Hosts drawn by the seed ask others, until the time is over."""

    SETTINGS: ClassVar[type[EchoSettings]] = EchoSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "asked": "questions",
        "answered.share": "of the questions whose host lived",
        "wrong": "answers that differ from their questions",
        "answer_s": "seconds from question to answer",
        "alive": "hosts that run, over time",
    }

    def __init__(self, world: World, settings: EchoSettings, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        self._answered = 0
        self._asked = 0
        for name in ("asked", "wrong"):
            metrics.count(name, 0)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sample(), name="sampling")
            draws = self._world.random("questions")
            while True:
                await asyncio.sleep(draws.expovariate(self._settings.asks_per_s))
                alive = self._world.alive()
                if not alive:
                    continue
                asker, asked = draws.choice(alive), draws.choice(list(self._world.machines.values()))
                data = draws.randbytes(draws.randrange(1, self._settings.bytes_max))
                tasks.create_task(self._ask(asker, asked, data), name=f"{asker.name} asks {asked.name}")

    async def _ask(self, asker: Machine, asked: Machine, data: bytes) -> None:
        peer = cast(EchoPeer | None, asker.peer)
        if peer is None:
            return
        began_s = self._world.now_s
        try:
            answer = await self._world.on(
                asker, peer.ask(tcp_address(asked.address, LISTEN_PORT), data, self._settings.timeout_s)
            )
        except HostDied:
            return
        except (DialError, OSError, TimeoutError) as error:
            self._world.trace.note(asker.name, f"{asked.name} gave no answer: {error!r}")
            self._count(asker, 0)
            return
        self._metrics.observe("answer_s", self._world.now_s - began_s, of=asker.name)
        self._metrics.count("wrong", int(answer != data), of=asked.name if answer != data else "")
        self._world.trace.add("answer", asker.name, f"{asked.name} {len(answer)} {answer == data}")
        self._count(asker, 1)

    def _count(self, asker: Machine, answered: int) -> None:
        self._asked += 1
        self._answered += answered
        self._metrics.count("asked")
        self._metrics.put("answered.share", self._answered / self._asked, of="" if answered else asker.name)

    async def _sample(self) -> None:
        while True:
            self._metrics.sample("alive", self._world.now_s, len(self._world.alive()))
            await asyncio.sleep(self._settings.sample_s)


WORKLOADS = {"echo": Echo}
