"""Texts over whole daemons, while servers on their routes are struck: the text must always be the same.

Owns who asks for what, which hop of a live route is struck at which token (`netsim.strikes`), and what is measured of it.
What a text has to be is worked out in one place and without any of the machinery: by `netsim.arithmetic`, or by local `transformers`.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - the seeded generators that the world hands out
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from netsim.answers import Answers
from netsim.arithmetic import PRIME, Arithmetic
from netsim.cells import CellCount
from netsim.ledger import Ledger
from netsim.metrics import Metrics
from netsim.mischief import CELLS, Mischief
from netsim.online import SAMPLE_S, is_ready, sample_coverage, wait_online
from netsim.peers.node import TORCH, Answer, NodePeer, NodeSettings, use_no_threads
from netsim.sim_host import Machine
from netsim.strikes import STRIKES, Kinds, Strike, Striker
from netsim.world import HostDied, World
from overlay.errors import PeerdError

ASK_AGAIN_S = 0.5
FORGET_TOKENS = (1, 5)
"""A journal fills a gap with as many windows as may be under way, 8; what is longer is the driver's to send again."""
FORGOTTEN_S = 0.5


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """The workload's part of a scenario.

    Attributes:
        texts: by each driver, one after the other.
        strikes: how hops are struck: in an order that is drawn, each once before any comes again; none where it is empty.
        strikes_per_text: this many tokens of each text are drawn, and a hop of the route is struck when it has come so far; 0 is the
            time before the first token.
        back_after_s: when what was struck is as before.
        strike_tokens: from which token to which; None: any.
        in_order: the first text is struck at token 0, the second at token 1, and so on.
        strike_drivers: the share of the strikes that hit the driver itself.
        leases_end_s: after the last text, until nothing may be left: what a driver left behind is freed when its lease ends, 30 s after its
            last word.
        copies: the share of session messages that are followed by a copy of some cell (`netsim.mischief`).
        swaps: the share of windows that are sent after the next one.
        forgets: the share of texts in which a hop, not the first, loses its KV at one of the first tokens: `FORGET_TOKENS`.
    """

    drivers: str = "driver"
    servers: str = "server"
    texts: int = 3
    prompt_tokens: tuple[int, int] = (16, 200)
    new_tokens: tuple[int, int] = (24, 48)
    think_s: tuple[float, float] = (0.0, 1.0)
    wait_s: float = 60.0
    strikes: tuple[str, ...] = ()
    strikes_per_text: int = 1
    back_after_s: tuple[float, float] = (5.0, 30.0)
    strike_drivers: float = 0.0
    ready_s: float = 120.0
    leases_end_s: float = 45.0
    strike_tokens: tuple[int, int] | None = None
    in_order: bool = False
    copies: float = 0.0
    swaps: float = 0.0
    forgets: float = 0.0

    def __post_init__(self) -> None:
        for name in self.strikes:
            if name not in STRIKES:
                raise ValueError(f"strikes: there is no {name!r}; there are {', '.join(sorted(STRIKES))}")


class Texts:
    """See the module."""

    SETTINGS: ClassVar[type[SessionSettings]] = SessionSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "texts.asked": "texts",
        "texts.done": "texts that came to their end",
        "texts.wrong": "texts that differ from the model's",
        "texts.failed": "texts that ended with an error though their driver lived",
        "texts.taken_along": "texts whose driver died, and that were asked for again",
        "tokens": "tokens that drivers got",
        "replays": "times that a session moved to another route",
        "first_token_s": "seconds from asking to the first token",
        "token_s": "seconds between two tokens of texts that weren't struck",
        "recovery_s": "seconds of the longest pause after a strike on a hop of a live route",
        "recovery_s.*": "seconds of that pause by kind of strike",
        "strikes": "strikes on hops of live routes",
        "strikes.*": "the same by kind",
        "strikes.kinds": "kinds of strikes that happened, of those that were to",
        "online_s": "seconds until every block was served",
        "left.sessions": "sessions that servers still held long after the last text",
        "left.kv_bytes": "KV memory reserved long after the last text",
        "coverage.*": "servers of a block that are online, over time",
        "coverage.min": "of the blocks, the fewest, over time",
        "tokens_per_s": "over all drivers, over time",
        "copies": "copies of session messages that were made up and sent",
        "copies.hop.*": "the same by cell, to hops",
        "copies.driver.*": "the same by cell, to drivers",
        "gaps": "gaps that a hop told the one before it",
        "journal.repairs": "gaps that were filled out of the journal of the hop before",
        "journal.answers": "windows and results that hops said again, out of their journals",
        "emptied": "windows that hops passed on empty, since they were cancelled",
        "unasked": "things that hops said or computed with no message behind them (`netsim.ledger`)",
        "answers": "messages to hops whose answer the tables of docs/protocol.md tell (`netsim.answers`)",
        "answers.*": "the same by answer",
        "misanswered": "those that were answered otherwise, or not",
        "cells": "cells of the tables of docs/protocol.md whose copies were sent",
    }

    def __init__(self, world: World, settings: SessionSettings, metrics: Metrics) -> None:
        self.world = world
        self.settings = settings
        self.metrics = metrics
        for name in METRICS_FROM_ZERO:
            metrics.count(name, 0)
        for name in ("recovery_s", "token_s", "first_token_s"):
            metrics.expect(name)
        servers = world.group(settings.servers)
        told = cast(NodeSettings, servers[0].settings)
        self._expected = _reference(told)
        self.striker = Striker(world, settings.servers, told.blocks)
        self.kinds = Kinds(settings.strikes, world.random("kinds of strikes"))
        self.may_be_late = settings.strike_tokens is None and not settings.in_order
        """Where nobody can be struck, whether that is tried again at each further token of the text."""
        self._happened: dict[str, None] = {}
        metrics.owed_by("strikes.kinds", (f"strikes.{kind}" for kind in settings.strikes))
        self._tokens_before = 0.0

    async def run(self) -> None:
        """Wait for the swarm, let every driver ask for its texts, and see that nothing is left of them."""
        with Ledger(self.metrics.count, self._protest).entered():
            await self._run_with_copies()

    def _protest(self, host: str, session: str, text: str) -> None:
        self.world.trace.add("unasked", host, text, session)
        self.metrics.count("unasked", of=session)

    async def _run_with_copies(self) -> None:
        settings = self.settings
        if not settings.copies and not settings.swaps:
            await self._run()
            return
        cells = CellCount(self.metrics, (cell.name for cell in CELLS))
        draws = self.world.random("mischief")
        self.metrics.count("misanswered", 0)
        answers = Answers(self.world.loop.time, self.metrics.count, self._misanswered)
        with answers.entered():
            mischief = Mischief(self.world.loop, draws, settings.copies, settings.swaps, cells.copied)
            with mischief.entered():
                await self._run()
        answers.finish()

    def _misanswered(self, host: str, session: str, text: str) -> None:
        self.world.trace.add("misanswered", host, text, session)
        self.metrics.count("misanswered", of=session)

    async def _run(self) -> None:
        settings = self.settings
        async with asyncio.TaskGroup() as background:
            samples = sample_coverage(self.world, self.striker, self.metrics, self._sample_tokens)
            sampling = background.create_task(samples, name="sampling")
            await wait_online(self.world, self.striker, settings.drivers, self.metrics, settings.ready_s)
            self.metrics.owed_by("texts.done", (machine.name for machine in self.world.group(settings.drivers)))
            async with asyncio.TaskGroup() as asking:
                for machine in self.world.group(settings.drivers):
                    asking.create_task(self._drive(machine), name=f"{machine.name} asks")
            await self.striker.wait_all_back()
            await asyncio.sleep(settings.leases_end_s)
            self._count_left()
            sampling.cancel()

    # --- one driver ---

    async def _drive(self, machine: Machine) -> None:
        draws = self.world.random(f"texts of {machine.name}")
        for index in range(self.settings.texts):
            prompt = tuple(draws.randrange(PRIME) for _ in range(draws.randint(*self.settings.prompt_tokens)))
            count = draws.randint(*self.settings.new_tokens)
            self.metrics.count("texts.asked")
            strikes = self.settings.strikes_per_text if self.settings.strikes else 0
            plan = [self._strike(draws, count, index) for _ in range(strikes)]
            if self.settings.forgets and draws.random() < self.settings.forgets:
                plan.append(Strike("forget", draws.randint(*FORGET_TOKENS), draws.random(), FORGOTTEN_S))
            await self._until_done(machine, prompt, count, plan)
            await asyncio.sleep(draws.uniform(*self.settings.think_s))
        self.metrics.gave("texts.done", machine.name)

    async def _until_done(self, machine: Machine, prompt: tuple[int, ...], count: int, plan: Sequence[Strike]) -> None:
        """Ask; again when the driver died meanwhile."""
        while True:
            while not is_ready(machine):  # noqa: ASYNC110 - virtual time is cheap, and no daemon tells of its death
                await asyncio.sleep(ASK_AGAIN_S)
            text = _Text(self, machine, sorted(plan, key=lambda strike: strike.at_token))
            plan = ()  # a text that was taken along is let through the next time
            try:
                answer = await text.ask(prompt, count)
            except HostDied:
                self.metrics.count("texts.taken_along")
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            except PeerdError as error:
                self.world.trace.note(machine.name, f"no text: {error.code}: {error}")
                self.metrics.count("texts.failed", of=machine.name)
                self.metrics.count("texts.done", 0, of=machine.name)
                return
            self._note(machine, answer, self._expected(prompt, count), is_struck=text.is_struck)
            return

    def _strike(self, draws: random.Random, count: int, index: int) -> Strike:
        """One whose kind is still to be drawn: which kinds have come by then depends on the other drivers."""
        settings = self.settings
        first, last = settings.strike_tokens or (0, count - 1)
        at_token = draws.randint(first, min(last, count - 1))
        if settings.in_order:
            at_token = index % count
        hits_driver = draws.random() < settings.strike_drivers
        return Strike("", at_token, draws.random(), draws.uniform(*settings.back_after_s), hits_driver)

    def _note(self, machine: Machine, answer: Answer, expected: Sequence[int], *, is_struck: bool) -> None:
        metrics = self.metrics
        wrong = list(answer.token_ids) != list(expected) or answer.finish_reason != "length"
        metrics.count("texts.done")
        metrics.count("texts.wrong", int(wrong), of=answer.session if wrong else "")
        metrics.count("replays", answer.replays)
        self.world.trace.add("text", machine.name, f"{len(answer.token_ids)} {answer.replays} {wrong}", answer.session)
        if not is_struck and not answer.replays and len(answer.token_at_s) > 1:
            (first_s, _), (last_s, _) = answer.token_at_s[0], answer.token_at_s[-1]
            tokens = sum(count for _, count in answer.token_at_s[1:])
            metrics.observe("token_s", (last_s - first_s) / tokens, of=answer.session)

    def strike(self, machine: Machine, planned: Strike) -> Strike | None:
        """Strike, and count it; None where there was nobody to strike."""
        strike = replace(planned, kind=planned.kind or self.kinds.take())
        if not self.striker.strike(machine, strike):
            if not planned.kind:
                self.kinds.put_back(strike.kind)
            return None
        name = f"strikes.{strike.kind}"
        self.metrics.count("strikes")
        self.metrics.count(name)
        if not planned.kind:
            self._happened[strike.kind] = None
            self.metrics.put("strikes.kinds", len(self._happened))
            self.metrics.gave("strikes.kinds", name)
        return strike

    # --- what is seen from outside ---

    def _sample_tokens(self) -> None:
        tokens = self.metrics.numbers().get("tokens", 0.0)
        self.metrics.sample("tokens_per_s", self.world.now_s, (tokens - self._tokens_before) / SAMPLE_S)
        self._tokens_before = tokens

    def _count_left(self) -> None:
        for machine in self.world.alive():
            peer = cast(NodePeer | None, machine.peer)
            if peer is not None:
                sessions, kv_bytes = peer.gauge("sessions_served"), peer.gauge("kv_bytes")
                self.metrics.count("left.sessions", sessions, of=machine.name if sessions else "")
                self.metrics.count("left.kv_bytes", kv_bytes, of=machine.name if kv_bytes else "")


METRICS_FROM_ZERO = (
    "texts.asked", "texts.done", "texts.wrong", "texts.failed", "texts.taken_along",
    "tokens", "replays", "strikes", "strikes.kinds", "left.sessions", "left.kv_bytes",
    "gaps", "journal.repairs", "journal.answers", "emptied", "unasked",
)  # fmt: skip


class _Text:
    """One text being asked for, with the strikes that it will see."""

    def __init__(self, workload: Texts, machine: Machine, plan: list[Strike]) -> None:
        self._workload = workload
        self._machine = machine
        self._plan = plan
        self._count = 0
        self._news = asyncio.Event()
        self._struck = ""
        self._last_s = 0.0
        self._pause_s = 0.0
        self.is_struck = False

    async def ask(self, prompt: tuple[int, ...], count: int) -> Answer:
        """Raises HostDied, PeerdError."""
        workload, world = self._workload, self._workload.world
        peer = cast(NodePeer, self._machine.peer)
        asked_s = self._last_s = world.now_s
        striking = asyncio.ensure_future(self._strike_all())  # noqa: TID251 - cancelled below
        try:
            answer = await world.on(
                self._machine,
                peer.generate(prompt, count, wait_s=workload.settings.wait_s, on_tokens=self._on_tokens),
            )
        finally:
            striking.cancel()
            await asyncio.wait({striking})
        self._note_recovery()
        started_s = world.loop.time() - world.now_s
        workload.metrics.observe("first_token_s", answer.token_at_s[0][0] - started_s - asked_s, of=answer.session)
        return answer

    def _on_tokens(self, count: int) -> None:
        """In the driver's context, so it only notes."""
        self._workload.metrics.count("tokens", count - self._count)
        self._count = count
        now_s = self._workload.world.now_s
        self._pause_s = max(self._pause_s, now_s - self._last_s)
        self._last_s = now_s
        self._news.set()

    def _note_recovery(self) -> None:
        """The longest pause since the last strike: what was under way then may still have come."""
        kind, self._struck = self._struck, ""
        if kind:
            self._workload.metrics.observe("recovery_s", self._pause_s, of=self._machine.name)
            self._workload.metrics.observe(f"recovery_s.{kind}", self._pause_s, of=self._machine.name)

    async def _come_to(self, token: int) -> None:
        while self._count < token:
            self._news.clear()
            await self._news.wait()

    async def _strike_all(self) -> None:
        workload = self._workload
        for strike in self._plan:
            if strike.at_token == 0:
                await asyncio.sleep(strike.share * 0.5)
            await self._come_to(strike.at_token)
            struck = workload.strike(self._machine, strike)
            while struck is None and workload.may_be_late:
                await self._come_to(self._count + 1)
                struck = workload.strike(self._machine, strike)
            if struck is not None:
                self.is_struck = True
                self._note_recovery()
                self._pause_s = 0.0
                self._struck = "driver" if struck.hits_driver else struck.kind


def _reference(told: NodeSettings) -> Callable[[Sequence[int], int], list[int]]:
    """The model's own text, in one place."""
    if told.numbers != TORCH:
        return Arithmetic(told.blocks, told.width).generate
    use_no_threads()
    from blocks.model.exact import Reference

    return Reference.load(told.model).greedy


WORKLOADS = {"texts": Texts}
