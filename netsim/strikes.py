"""What can happen to a hop of a live route, or to its driver, and how it is undone.

Owns who is struck now, so that every block keeps a server that isn't (a swarm that lacks blocks has no text to give), and the way back.
Knows routes only as `peerctl status` shows them.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - a seeded generator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from netsim.peers.node import NodePeer
from netsim.sim_host import Machine
from netsim.world import State, World
from routing.types import Span

SLOW_FACTOR = 300.0
"""A step of some 3 ms takes a second; one of a long prefill many."""
WORN_FACTOR, WORN_LOSS = 10.0, 0.05
"""A path that gets slow: 40 ms one way become 400, and of twenty segments one is lost."""
STILL_SERVES = ("forget", "fill-disk")
"""After these a server goes on serving, so that no other has to."""
BACK_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Strike:
    """What, when the text has how many tokens, on which hop (as a share of the route), and for how long."""

    kind: str
    at_token: int
    share: float
    back_after_s: float
    hits_driver: bool = False


Undo = Callable[[], object]


class Kinds:
    """Kinds of strikes in an order that is drawn: each comes once before any comes again."""

    def __init__(self, kinds: Sequence[str], draws: random.Random) -> None:
        self._kinds = tuple(kinds)
        self._draws = draws
        self._left: list[str] = []

    def take(self) -> str:
        """The next kind."""
        if not self._left:
            self._left = self._draws.sample(self._kinds, len(self._kinds))
        return self._left.pop()

    def put_back(self, kind: str) -> None:
        """What could not be done is the next to be."""
        self._left.append(kind)


class Striker:
    """See the module."""

    def __init__(self, world: World, servers: str, blocks: int) -> None:
        self._world = world
        self._servers = servers
        self._blocks = blocks
        self._struck: dict[str, int] = {}

    # --- what is served, in truth ---

    def spans(self) -> list[tuple[Machine, Span]]:
        """Who serves what, of those that run."""
        found = []
        for machine in self._world.alive(self._servers):
            span = cast(NodePeer, machine.peer).serves() if machine.peer is not None else None
            if span is not None:
                found.append((machine, span))
        return found

    def coverage(self, without: tuple[str, ...] = ()) -> list[int]:
        """Servers of each block."""
        counts = [0] * self._blocks
        for machine, span in self.spans():
            if machine.name not in without:
                for block in range(span.start, span.end):
                    counts[block] += 1
        return counts

    def weakest(self) -> int:
        """Of the blocks, the fewest servers."""
        return min(self.coverage())

    # --- strikes ---

    def strike(self, driver: Machine, strike: Strike) -> bool:
        """Hit a hop of the driver's oldest session, or the driver itself. False when there is none, or each would leave a gap."""
        if strike.hits_driver:
            return self._hit(driver, driver, strike, STRIKES[strike.kind])
        session, hops = self._oldest_of(driver)
        if not hops:
            return False
        first = int(strike.kind == "forget" and len(hops) > 1)  # what the first hop lacks, no journal has
        chosen = first + int(strike.share * (len(hops) - first))
        for index in (*range(chosen, len(hops)), *range(first, chosen)):
            onward = hops[index + 1] if index + 1 < len(hops) else driver
            if self.strike_one(hops[index], onward, strike):
                self._world.trace.add("strike", hops[index].name, f"{strike.kind} of hop {index}", session)
                return True
        return False

    def strike_one(self, target: Machine, onward: Machine, strike: Strike) -> bool:
        """Hit a server, or its way to ``onward``. False when it would leave a gap."""
        takes_away = strike.kind not in STILL_SERVES
        if takes_away and (target.name in self._struck or min(self.coverage((target.name, *self._struck))) < 1):
            return False
        return self._hit(target, onward, strike, STRIKES[strike.kind])

    def _hit(self, target: Machine, onward: Machine, strike: Strike, how: StrikeKind) -> bool:
        if target.state is not State.RUNNING:
            return False
        undo = how(self._world, target, onward)
        self._struck[target.name] = self._struck.get(target.name, 0) + 1
        self._world.loop.call_later(strike.back_after_s, self._undo, target, undo)
        return True

    def _undo(self, target: Machine, undo: Undo) -> None:
        undo()
        self._struck[target.name] -= 1
        if not self._struck[target.name]:
            del self._struck[target.name]

    async def wait_all_back(self) -> None:
        """Until nothing is struck any more."""
        deadline = self._world.now_s + BACK_S_MAX
        while self._struck and self._world.now_s < deadline:  # noqa: ASYNC110 - virtual time is cheap
            await asyncio.sleep(1.0)

    def _oldest_of(self, driver: Machine) -> tuple[str, list[Machine]]:
        """The driver's oldest session, and the machines of its route without the driver itself."""
        peer = cast(NodePeer | None, driver.peer)
        sessions = peer.status().sessions if peer is not None else ()
        if not sessions:
            return "", []
        by_peer = {
            str(cast(NodePeer, machine.peer).node.identity.peer_id): machine
            for machine in self._world.alive(self._servers)
            if machine.peer is not None
        }
        hops = [by_peer[hop.peer] for hop in sessions[0].route if hop.peer in by_peer]
        return sessions[0].session, hops


StrikeKind = Callable[[World, Machine, Machine], Undo]
"""(world, target, next hop or driver) -> how it is undone."""


def _kill(world: World, target: Machine, onward: Machine) -> Undo:
    world.kill(target)
    return lambda: world.restart(target)


def _wipe(world: World, target: Machine, onward: Machine) -> Undo:
    world.kill(target)
    return lambda: world.restart(target, keep_state=False)


def _power_off(world: World, target: Machine, onward: Machine) -> Undo:
    world.power_off(target)
    return lambda: world.restart(target)


def _restart(world: World, target: Machine, onward: Machine) -> Undo:
    world.restart(target)
    return lambda: None


def _stop(world: World, target: Machine, onward: Machine) -> Undo:
    """In good order: it drains, and its drivers move before it goes."""
    world.stop(target)
    return lambda: world.restart(target)


def _freeze(world: World, target: Machine, onward: Machine) -> Undo:
    world.freeze(target)
    return lambda: world.thaw(target)


def _sleep(world: World, target: Machine, onward: Machine) -> Undo:
    """The lid is closed: what was under way to it or from it is lost, and its peers aren't told."""
    world.sleep(target)
    return lambda: world.wake(target)


def _slow(world: World, target: Machine, onward: Machine) -> Undo:
    world.slow(target, SLOW_FACTOR)
    return lambda: world.slow(target, 1.0)


def _one_way(world: World, target: Machine, onward: Machine) -> Undo:
    """What it sends to the next hop is lost; everything else passes, also between the same two the other way."""
    number = world.partition((target.name,), (onward.name,), both_ways=False)
    return lambda: world.heal(number)


def _cut_off(world: World, target: Machine, onward: Machine) -> Undo:
    others = [name for name in world.machines if name != target.name]
    number = world.partition((target.name,), others)
    return lambda: world.heal(number)


def _reset(world: World, target: Machine, onward: Machine) -> Undo:
    """Its connection to the next hop ends; both live."""
    world.fabric.reset(target.name, onward.name)
    return lambda: None


def _degrade(world: World, target: Machine, onward: Machine) -> Undo:
    """The path to the next hop gets slow and loses more, both ways; of a driver, its paths to all."""
    others = (onward.name,) if onward is not target else tuple(name for name in world.machines if name != target.name)
    world.degrade((target.name,), others, WORN_FACTOR, WORN_LOSS)
    return lambda: world.degrade((target.name,), others, 1.0, 0.0)


def _fill_disk(world: World, target: Machine, onward: Machine) -> Undo:
    """Whatever it writes fails from now on."""
    world.fill_disk(target, True)
    return lambda: world.fill_disk(target, False)


def _full(world: World, target: Machine, onward: Machine) -> Undo:
    world.fill_memory(target, True)
    world.fabric.reset(target.name, onward.name)
    return lambda: world.fill_memory(target, False)


def _lie_shape(world: World, target: Machine, onward: Machine) -> Undo:
    world.lie(target, "shape")
    return lambda: world.lie(target, "")


def _lie_numbers(world: World, target: Machine, onward: Machine) -> Undo:
    """Right shapes, wrong numbers: hidden states, outputs and gradients alike."""
    world.lie(target, "numbers")
    return lambda: world.lie(target, "")


def _forget(world: World, target: Machine, onward: Machine) -> Undo:
    """It takes back the KV of its sessions, as it does with idle ones where memory is short; the sessions stay."""
    peer = cast(NodePeer, target.peer)

    async def forget() -> None:
        peer.forget_kv()

    world.spawn(target, forget(), "forgets")
    return lambda: None


STRIKES: Mapping[str, StrikeKind] = {
    "kill": _kill,
    "wipe": _wipe,
    "power-off": _power_off,
    "restart": _restart,
    "stop": _stop,
    "freeze": _freeze,
    "sleep": _sleep,
    "slow": _slow,
    "one-way": _one_way,
    "cut-off": _cut_off,
    "reset": _reset,
    "degrade": _degrade,
    "fill-disk": _fill_disk,
    "full": _full,
    "forget": _forget,
    "lie-shape": _lie_shape,
    "lie-numbers": _lie_numbers,
}
