"""Who is struck, who isn't lest a block lose its last server, and that all is as before afterwards.

Machines are the world's; the peers on them say what they serve and which route they have, and do nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from netsim import world as world_module
from netsim.sim_host import Machine, SimHost, State
from netsim.strikes import STRIKES, Strike, Striker
from netsim.world import World
from routing.types import Span
from tests.netsim.test_world import in_world

BLOCKS = 4
BACK_S = 5.0


@dataclass(frozen=True, slots=True)
class Serves:
    """Which blocks; none: a driver, with the hops of its session."""

    span: Span | None = None
    route: tuple[str, ...] = ()


class Quiet:
    """As much of a daemon as strikes look at."""

    SETTINGS: ClassVar[type[Any]] = Serves

    def __init__(self, host: SimHost, settings: Serves) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self.node = SimpleNamespace(identity=SimpleNamespace(peer_id=host.name))
        self.forgot = 0

    async def run(self) -> None:
        await self._stop.wait()

    def request_stop(self) -> None:
        self._stop.set()

    def serves(self) -> Span | None:
        return self._settings.span

    def status(self) -> Any:
        hops = [SimpleNamespace(peer=name) for name in self._settings.route]
        sessions = [SimpleNamespace(session="first", route=hops), SimpleNamespace(session="second", route=[])]
        return SimpleNamespace(sessions=sessions if hops else [])

    def forget_kv(self) -> None:
        self.forgot += 1


class Scene:
    """Servers by their spans, and a driver whose oldest session goes over the hops named."""

    def __init__(self, world: World, *spans: tuple[int, int], route: tuple[str, ...] = ()) -> None:
        self.world = world
        for index, (start, end) in enumerate(spans, 1):
            world.start(world.add_host(f"server-{index}", "quiet", group="server", settings=Serves(Span(start, end))))
        self.driver = world.add_host("driver-1", "quiet", group="driver", settings=Serves(route=route))
        world.start(self.driver)
        self.striker = Striker(world, "server", BLOCKS)

    def server(self, number: int) -> Machine:
        return self.world.machines[f"server-{number}"]

    def cut(self, source: Machine, target: Machine) -> bool:
        return self.world.fabric.is_cut(source.name, target.name, self.world.fabric.path(source.name, target.name))

    @property
    def struck(self) -> list[str]:
        return [
            line.split()[2]
            for name in self.world.machines
            for line in self.world.trace.story(name)
            if " strike " in line
        ]


@pytest.fixture(autouse=True)
def _quiet_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "peer_class", lambda kind: Quiet)


def strike(kind: str = "kill", share: float = 0.0, *, hits_driver: bool = False) -> Strike:
    return Strike(kind, 1, share, BACK_S, hits_driver)


def test_coverage_counts_who_serves_each_block_and_runs() -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 2), (1, 4), (0, 4))
        await asyncio.sleep(1.0)
        assert (scene.striker.coverage(), scene.striker.weakest()) == ([2, 3, 2, 2], 2)
        assert scene.striker.coverage(("server-3",)) == [1, 2, 1, 1]
        world.freeze(scene.server(2))
        assert (scene.striker.coverage(), scene.striker.weakest()) == ([2, 2, 1, 1], 1)

    in_world(work)


def test_the_last_server_of_a_block_is_not_struck_before_another_is_back() -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 4), (0, 4), (0, 2))
        await asyncio.sleep(1.0)
        one, two, three = (scene.server(number) for number in (1, 2, 3))
        assert scene.striker.strike_one(one, two, strike("slow"))
        assert not scene.striker.strike_one(two, three, strike("slow")), "one still runs, but it is struck"
        assert not scene.striker.strike_one(one, two, strike("kill")), "no server is struck twice at once"
        assert scene.striker.strike_one(three, two, strike("kill"))
        await scene.striker.wait_all_back()
        assert world.now_s == pytest.approx(1.0 + BACK_S, abs=1.0)
        assert (one.condition.slow_factor, three.state) == (1.0, State.RUNNING)
        assert scene.striker.strike_one(two, three, strike("kill"))
        await scene.striker.wait_all_back()

    in_world(work)


@pytest.mark.parametrize(("share", "hit"), [(0.0, 1), (0.34, 2), (0.99, 3)])
def test_the_share_says_which_hop_of_the_oldest_route(share: float, hit: int) -> None:
    async def work(world: World) -> None:
        spans = ((0, 1), (1, 2), (2, 4), (0, 4))
        scene = Scene(world, *spans, route=("server-1", "server-2", "server-3"))
        await asyncio.sleep(1.0)
        assert scene.striker.strike(scene.driver, strike("kill", share))
        states = [scene.server(number).state for number in (1, 2, 3, 4)]
        assert [number for number, state in enumerate(states, 1) if state is State.IDLE] == [hit]
        assert scene.struck == [f"server-{hit}"]
        await scene.striker.wait_all_back()

    in_world(work)


def test_the_first_hop_of_several_never_forgets_for_no_journal_has_what_it_lacks() -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 2), (2, 4), (0, 4), route=("server-1", "server-2"))
        await asyncio.sleep(1.0)
        assert scene.striker.strike(scene.driver, strike("forget", 0.0))
        await asyncio.sleep(0.1)
        assert [getattr(scene.server(number).peer, "forgot", None) for number in (1, 2)] == [0, 1]

    in_world(work)


def test_without_a_session_or_without_a_server_to_spare_nothing_is_struck() -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 4), (0, 4))
        await asyncio.sleep(1.0)
        assert not scene.striker.strike(scene.driver, strike())
        assert all(machine.state is State.RUNNING for machine in world.machines.values())

    async def alone(world: World) -> None:
        scene = Scene(world, (0, 2), (2, 4), route=("server-1", "server-2"))
        await asyncio.sleep(1.0)
        assert not scene.striker.strike(scene.driver, strike())
        assert scene.struck == []
        assert all(machine.state is State.RUNNING for machine in world.machines.values())

    in_world(work)
    in_world(alone)


def test_a_driver_is_struck_as_servers_are_and_one_that_stands_still_already_is_not() -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 4))
        await asyncio.sleep(1.0)
        assert scene.striker.strike(scene.driver, strike("freeze", hits_driver=True))
        is_frozen = scene.driver.state is State.FROZEN
        assert is_frozen
        assert not scene.striker.strike(scene.driver, strike("kill", hits_driver=True))
        await scene.striker.wait_all_back()
        assert scene.driver.state is State.RUNNING

    in_world(work)


def state_is(state: State) -> Callable[[Scene, Machine, Machine], bool]:
    return lambda scene, target, onward: target.state is state


def restarted(scene: Scene, target: Machine, onward: Machine) -> bool:
    return target.incarnation == 2 and target.state is State.RUNNING


def lies(how: str) -> Callable[[Scene, Machine, Machine], bool]:
    return lambda scene, target, onward: target.condition.lie == how


SHOWS: dict[str, Callable[[Scene, Machine, Machine], bool]] = {
    "kill": state_is(State.IDLE),
    "wipe": state_is(State.IDLE),
    "power-off": state_is(State.DARK),
    "restart": restarted,
    "stop": state_is(State.IDLE),
    "freeze": state_is(State.FROZEN),
    "sleep": state_is(State.ASLEEP),
    "slow": lambda scene, target, onward: target.condition.slow_factor > 1,
    "one-way": lambda scene, target, onward: scene.cut(target, onward) and not scene.cut(onward, target),
    "cut-off": lambda scene, target, onward: scene.cut(target, scene.driver) and scene.cut(scene.driver, target),
    "fill-disk": lambda scene, target, onward: target.disk.is_full,
    "full": lambda scene, target, onward: target.condition.is_memory_full,
    "forget": lambda scene, target, onward: getattr(target.peer, "forgot", 0) == 1,
    "lie-shape": lies("shape"),
    "lie-numbers": lies("numbers"),
}
"""What can be seen of a strike; of the others, only what becomes of the connections between two."""


@pytest.mark.parametrize("kind", STRIKES)
def test_each_strike_shows_and_is_undone(kind: str) -> None:
    async def work(world: World) -> None:
        scene = Scene(world, (0, 4), (0, 4))
        await asyncio.sleep(1.0)
        target, onward = scene.server(1), scene.server(2)
        number, path = target.disk.number, world.fabric.path(target.name, onward.name)
        assert scene.striker.strike_one(target, onward, strike(kind))
        await asyncio.sleep(0.5)
        if kind in SHOWS:
            assert SHOWS[kind](scene, target, onward)
        await scene.striker.wait_all_back()
        await asyncio.sleep(0.5)
        assert target.state is State.RUNNING
        condition = target.condition
        assert (condition.slow_factor, condition.is_memory_full, condition.lie) == (1.0, False, "")
        assert not target.disk.is_full
        assert not scene.cut(target, onward)
        assert not scene.cut(scene.driver, target)
        assert world.fabric.path(target.name, onward.name) == path
        assert (target.disk.number != number) == (kind == "wipe")

    in_world(work)
