"""A crowd of whole daemons: many servers of several kinds that place themselves, leave and come back while texts run.

Owns who asks for how many texts, and what is measured of the swarm as a whole: cover of blocks, how soon servers serve, what a text
costs, what is left. Numbers are blank, so a text is right when it has its length and the ids that zeros give; exactness is `sessions`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.arithmetic import PRIME
from netsim.metrics import Metrics
from netsim.online import is_ready
from netsim.peers.node import BLANK, Answer, NodePeer, NodeSettings
from netsim.sim_host import Machine
from netsim.strikes import Striker
from netsim.workloads import Scene
from netsim.workloads.dht import count_connections
from netsim.world import HostDied, State, World
from overlay.errors import PeerdError
from routing.types import Span

SAMPLE_S = 1.0
BLANK_ID = 0
"""What sampling gives where nothing is computed."""


@dataclass(frozen=True, slots=True)
class CrowdSettings:
    """The workload's part of a scenario.

    Attributes:
        servers: the groups that serve.
        texts: by each driver, one after the other.
        settled_s: by then every block has to be served, and from then on always; the first text is asked for then.
        leases_end_s: after the last text, until nothing may be left.
    """

    drivers: str = "driver"
    servers: tuple[str, ...] = ("server",)
    texts: int = 3
    prompt_tokens: tuple[int, int] = (16, 64)
    new_tokens: tuple[int, int] = (16, 32)
    think_s: tuple[float, float] = (0.0, 2.0)
    wait_s: float = 60.0
    settled_s: float = 60.0
    leases_end_s: float = 45.0


class _Servers(Striker):
    """Who serves what, over several groups."""

    def __init__(self, world: World, groups: tuple[str, ...]) -> None:
        machines = [machine for group in groups for machine in world.group(group)]
        told = [cast(NodeSettings, machine.settings) for machine in machines]
        if any(found.numbers != BLANK for found in told):
            raise ValueError(f"a crowd's numbers are {BLANK!r}")
        super().__init__(world, "", told[0].blocks)
        self._machines = machines

    def spans(self) -> list[tuple[Machine, Span]]:
        peers = [
            (machine, cast(NodePeer, machine.peer)) for machine in self._machines if machine.state is State.RUNNING
        ]
        return [(machine, span) for machine, peer in peers if peer is not None and (span := peer.serves()) is not None]

    def cover_of(self, spans: list[Span]) -> list[int]:
        """Servers of each block."""
        counts = [0] * self._blocks
        for span in spans:
            for block in range(span.start, span.end):
                counts[block] += 1
        return counts

    def rates(self) -> list[float]:
        """Tokens a second that each block's servers can do together, each busy with its own span only."""
        rates = [0.0] * self._blocks
        for machine, span in self.spans():
            rate = 1.0 / (cast(NodePeer, machine.peer).device.cost.step_s * len(span))
            for block in range(span.start, span.end):
                rates[block] += rate
        return rates

    def starting(self) -> list[Machine]:
        """Those that run, whatever they serve yet."""
        return [machine for machine in self._machines if machine.state is State.RUNNING]


class Crowd(Scene[CrowdSettings]):
    """See the module."""

    SETTINGS: ClassVar[type[CrowdSettings]] = CrowdSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "texts.asked": "texts",
        "texts.done": "texts that came to their end",
        "texts.wrong": "texts of another length, or of other ids than blank numbers give",
        "texts.failed": "texts that ended with an error though their driver lived",
        "tokens": "tokens that drivers got",
        "tokens_per_s": "over all drivers, over time",
        "throughput": "tokens of all drivers a second, from the first question to the last answer",
        "replays": "times that a session moved to another route",
        "first_token_s": "seconds from asking to the first token",
        "token_s": "seconds between two tokens of texts that never moved",
        "recovery_s": "seconds of the longest pause in texts that moved after their first token",
        "online_s": "seconds from a server's start to serving",
        "served": "servers that ever served, each life of a machine counted",
        "covered_s": "seconds until every block was served",
        "coverage.*": "servers of a block that are online, over time",
        "coverage.min": "of the blocks, the fewest, over time",
        "coverage.low": "the fewest servers that a block had once all was settled",
        "coverage.end": "the fewest servers that a block has at the end",
        "spread.share": "tokens a second that the weakest block's servers can do, as a share of the mean over blocks, when all was settled",
        "known.share": "of the servers that serve when all was settled, the share that each driver knows of",
        "online": "servers that serve, over time",
        "connections": "connections of a host, those that are closing too, once settled",
        "connections.over": "samples of a host, from its start, with more connections than the overlay's limit for idle ones",
        "dht.calls_per_s": "calls of the DHT that a host makes a second",
        "left.sessions": "sessions that servers still held long after the last text",
        "left.kv_bytes": "KV memory reserved long after the last text",
    }
    COUNTED = (
        "texts.asked", "texts.done", "texts.wrong", "texts.failed", "tokens", "replays", "served",
        "connections.over", "left.sessions", "left.kv_bytes",
    )  # fmt: skip

    def __init__(self, world: World, settings: CrowdSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._servers = _Servers(world, settings.servers)
        self._lives: dict[tuple[str, int], float] = {}
        """When lives of machines began that don't serve yet; below zero once they do."""
        self._covered_s: float | None = None
        self._low: int | None = None
        self._tokens = 0
        self._tokens_before = 0
        for name in ("recovery_s", "token_s", "first_token_s", "online_s", "known.share"):
            metrics.expect(name)

    async def run(self) -> None:
        """Let the swarm settle, let every driver ask for its texts, and see that nothing is left of them."""
        settings, world, metrics = self._settings, self._world, self._metrics
        drivers = world.group(settings.drivers)
        async with asyncio.TaskGroup() as background:
            watching = background.create_task(self._watch(), name="watching")
            await asyncio.sleep(settings.settled_s)
            self._note_spread()
            self._note_known(drivers)
            metrics.owed_by("texts.done", (machine.name for machine in drivers))
            asked_s = world.now_s
            async with asyncio.TaskGroup() as asking:
                for machine in drivers:
                    asking.create_task(self._drive(machine), name=f"{machine.name} asks")
            metrics.put("throughput", self._tokens / (world.now_s - asked_s))
            await asyncio.sleep(settings.leases_end_s)
            self._note_end()
            watching.cancel()

    # --- one driver ---

    async def _drive(self, machine: Machine) -> None:
        settings, draws = self._settings, self._world.random(f"texts of {machine.name}")
        for _ in range(settings.texts):
            await asyncio.sleep(draws.uniform(*settings.think_s))
            prompt = tuple(draws.randrange(PRIME) for _ in range(draws.randint(*settings.prompt_tokens)))
            await self._ask(machine, prompt, draws.randint(*settings.new_tokens))
        self._metrics.gave("texts.done", machine.name)

    async def _ask(self, machine: Machine, prompt: tuple[int, ...], count: int) -> None:
        metrics, peer = self._metrics, cast(NodePeer, machine.peer)
        if not is_ready(machine):
            self._world.fail(machine.name, "has not met its network")
            return
        metrics.count("texts.asked")
        text = _Text(self, peer)
        asked_s = self._world.loop.time()
        try:
            asking = peer.generate(prompt, count, wait_s=self._settings.wait_s, on_tokens=text.on_tokens)
            answer = await self._world.on(machine, asking)
        except (HostDied, PeerdError) as error:
            self._world.trace.note(machine.name, f"no text: {error}")
            metrics.count("texts.failed", of=machine.name)
            return
        wrong = answer.token_ids != (BLANK_ID,) * count or answer.finish_reason != "length"
        metrics.count("texts.done")
        metrics.count("texts.wrong", int(wrong), of=answer.session if wrong else "")
        metrics.count("replays", answer.replays)
        self._world.trace.add("text", machine.name, f"{len(answer.token_ids)} {answer.replays}", answer.session)
        metrics.observe("first_token_s", answer.token_at_s[0][0] - asked_s, of=answer.session)
        self._note_pauses(answer, text.replays_at_first)

    def _note_pauses(self, answer: Answer, replays_at_first: int) -> None:
        if answer.replays > replays_at_first:
            self._metrics.observe("recovery_s", answer.longest_pause_s(), of=answer.session)
        elif not answer.replays and len(answer.token_at_s) > 1:
            took_s = answer.token_at_s[-1][0] - answer.token_at_s[0][0]
            tokens = sum(count for _, count in answer.token_at_s[1:])
            self._metrics.observe("token_s", took_s / tokens, of=answer.session)

    def got(self, tokens: int) -> None:
        """Some driver got some."""
        self._tokens += tokens
        self._metrics.count("tokens", tokens)

    # --- what is seen from outside ---

    async def _watch(self) -> None:
        """Once a second, until cancelled."""
        while True:
            self._look()
            await asyncio.sleep(SAMPLE_S)

    def _look(self) -> None:
        metrics, now_s = self._metrics, self._world.now_s
        serving = self._servers.spans()
        coverage = self._servers.cover_of([span for _, span in serving])
        for block, servers in enumerate(coverage):
            metrics.sample(f"coverage.{block}", now_s, servers)
        fewest = min(coverage)
        metrics.sample("coverage.min", now_s, fewest)
        metrics.sample("online", now_s, len(serving))
        metrics.sample("tokens_per_s", now_s, (self._tokens - self._tokens_before) / SAMPLE_S)
        self._tokens_before = self._tokens
        self._note_online(serving)
        if fewest and self._covered_s is None:
            self._covered_s = now_s
            metrics.put("covered_s", now_s)
        is_settled = now_s >= self._settings.settled_s
        if is_settled:
            self._low = fewest if self._low is None else min(self._low, fewest)
            metrics.put("coverage.low", self._low)
        self._count_connections(is_settled=is_settled)

    def _note_online(self, serving: list[tuple[Machine, Span]]) -> None:
        now_s = self._world.now_s
        for machine in self._servers.starting():
            self._lives.setdefault((machine.name, machine.incarnation), now_s)
        for machine, _ in serving:
            life = (machine.name, machine.incarnation)
            began_s = self._lives[life]
            if began_s >= 0:
                self._lives[life] = -1.0
                self._metrics.count("served")
                self._metrics.observe("online_s", now_s - began_s, of=machine.name)

    def _count_connections(self, *, is_settled: bool) -> None:
        for machine in self._world.alive():
            peer = cast(NodePeer | None, machine.peer)
            if peer is not None:
                count = count_connections(self._metrics, machine, peer.host)
                if is_settled:
                    self._metrics.observe("connections", count, of=machine.name)

    def _note_spread(self) -> None:
        rates = self._servers.rates()
        self._metrics.put("spread.share", min(rates) * len(rates) / max(1e-9, sum(rates)))

    def _note_known(self, drivers: Sequence[Machine]) -> None:
        serving = [cast(NodePeer, machine.peer).host.peer_id.multihash for machine, _ in self._servers.spans()]
        for machine in drivers:
            peer = cast(NodePeer | None, machine.peer)
            if peer is not None:
                known = peer.servers_known()
                share = sum(server in known for server in serving) / max(1, len(serving))
                self._metrics.observe("known.share", share, of=machine.name)

    def _note_end(self) -> None:
        metrics, calls, hosts = self._metrics, 0, 0
        metrics.put("coverage.end", self._servers.weakest())
        for machine in self._world.alive():
            peer = cast(NodePeer | None, machine.peer)
            if peer is None:
                continue
            sessions, kv_bytes = peer.gauge("sessions_served"), peer.gauge("kv_bytes")
            metrics.count("left.sessions", sessions, of=machine.name if sessions else "")
            metrics.count("left.kv_bytes", kv_bytes, of=machine.name if kv_bytes else "")
            if machine.incarnation == 1:
                calls += peer.node._dht.statistics().calls
                hosts += 1
        metrics.put("dht.calls_per_s", calls / max(1, hosts) / self._world.now_s)


class _Text:
    """One text being asked for."""

    def __init__(self, crowd: Crowd, peer: NodePeer) -> None:
        self._crowd = crowd
        self._peer = peer
        self._count = 0
        self.replays_at_first = 0

    def on_tokens(self, count: int) -> None:
        """In the driver's context, so it only notes."""
        if not self._count:
            self.replays_at_first = sum(session.replays for session in self._peer.status().sessions)
        self._crowd.got(count - self._count)
        self._count = count


WORKLOADS = {"texts": Crowd}
