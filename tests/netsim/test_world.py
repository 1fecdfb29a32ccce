"""What befalls machines, seen by the peers on them: small peers of this file's own, over the fabric."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest

from netsim import world as world_module
from netsim.loop import HOST, VirtualLoop, heap_set_aside
from netsim.peers.echo import EchoPeer
from netsim.sim_host import LISTEN_PORT
from netsim.trace import Trace
from netsim.world import Fabric, HostDied, Machine, Route, SimHost, State, World, generator
from overlay.errors import DialError
from overlay.multiaddr import tcp_address

Work = Callable[[World], Awaitable[None]]


def in_world(work: Work, seed: int = 1, expected_errors: tuple[str, ...] = ()) -> World:
    """Run ``work`` in a world of its own, and close it."""
    loop = VirtualLoop()
    trace = Trace(loop.time)
    worlds: list[World] = []

    async def main() -> None:
        path = Route(0.01)
        fabric = Fabric(trace, generator(seed, "fabric"), path)
        world = World(seed, loop, fabric, trace, lambda one, other: path, expected_errors=expected_errors)
        worlds.append(world)
        async with asyncio.timeout(3600):
            await work(world)
        world.close()

    with heap_set_aside(), asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
    assert loop.failures == []
    return worlds[0]


def two_echoes(world: World) -> tuple[Machine, Machine]:
    one, two = world.add_host("one", "echo"), world.add_host("two", "echo")
    world.start(one)
    world.start(two)
    return one, two


async def ask(world: World, asker: Machine, asked: Machine, data: bytes = b"hello", timeout_s: float = 5.0) -> bytes:
    peer = cast(EchoPeer, asker.peer)
    return await world.on(asker, peer.ask(tcp_address(asked.address, LISTEN_PORT), data, timeout_s))


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Nothing to be told."""


class Ticking:
    """Counts seconds, aloud; its clean-up tries everything that a ghost might."""

    SETTINGS: ClassVar[type[Any]] = NoSettings
    said: ClassVar[list[tuple[int, float]]] = []
    cleaned: ClassVar[list[int]] = []

    def __init__(self, host: SimHost, settings: NoSettings) -> None:
        self._host = host

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(1.0)
                self.said.append((self._host.incarnation, self._host.world.now_s))
        finally:
            self.cleaned.append(self._host.incarnation)
            self._host.storage.save("ghost", b"was here")
            self._host.trace("ghost", "was here")

    def request_stop(self) -> None:
        """Never."""


class Ending(Ticking):
    """Ends by itself."""

    async def run(self) -> None:
        await asyncio.sleep(1.0)


class Failing(Ticking):
    """Ends with an error."""

    async def run(self) -> None:
        await asyncio.sleep(1.0)
        raise RuntimeError("the cellar is flooded")


class Lingering(Ticking):
    """Stops in good order, but leaves a task that won't be cancelled."""

    async def run(self) -> None:
        self._stop = asyncio.Event()
        self._stubborn = asyncio.get_running_loop().create_task(self._stay(), name="stubborn")
        await self._stop.wait()

    async def _stay(self) -> None:
        for _ in range(1000):
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                continue

    def request_stop(self) -> None:
        self._stop.set()


@pytest.fixture(autouse=True)
def own_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"ticking": Ticking, "ending": Ending, "failing": Failing, "lingering": Lingering}
    find = world_module.peer_class
    monkeypatch.setattr(world_module, "peer_class", lambda kind: ours.get(kind) or find(kind))
    Ticking.said.clear()
    Ticking.cleaned.clear()


def test_peers_reach_each_other_and_hosts_have_addresses_of_their_own() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        await asyncio.sleep(1)
        assert await ask(world, one, two) == b"hello"
        assert one.address != two.address

    assert in_world(work).failures == []


def test_a_killed_process_stands_still_for_ever_and_its_ghost_touches_nothing() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "ticking")
        world.start(machine)
        await asyncio.sleep(2.5)
        assert world.kill(machine)
        assert not world.kill(machine)
        await asyncio.sleep(100)
        assert (machine.state, machine.peer) == (State.IDLE, None)
        assert machine.disk.read("ghost") is None

    world = in_world(work)
    assert Ticking.said == [(1, 1.0), (1, 2.0)]
    assert not any("ghost" in line for line in world.trace.story("m"))
    assert world.failures == []


def test_a_restart_is_a_new_incarnation_with_the_old_disk_or_an_empty_one() -> None:
    async def work(world: World) -> None:
        one, _ = two_echoes(world)
        starts = []
        for keep_state in (True, True, False):
            await asyncio.sleep(1)
            starts.append(cast(EchoPeer, one.peer).starts)
            world.restart(one, keep_state)
        await asyncio.sleep(1)
        starts.append(cast(EchoPeer, one.peer).starts)
        assert starts == [1, 2, 3, 1]
        assert one.incarnation == 4
        assert one.disk.number == 2

    assert in_world(work).failures == []


def test_after_a_kill_and_a_restart_only_the_new_incarnation_speaks() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "ticking")
        world.start(machine)
        await asyncio.sleep(1.5)
        world.restart(machine)
        await asyncio.sleep(2.25)

    in_world(work)
    assert Ticking.said == [(1, 1.0), (2, 2.5), (2, 3.5)]


def test_real_files_go_with_the_disk_and_with_the_run() -> None:
    found = []

    async def work(world: World) -> None:
        machine = world.add_host("m", "echo")
        for keep_state in (True, True, False):
            world.restart(machine, keep_state)
            assert machine.host is not None
            found.append(machine.host.directory)
        found[0].mkdir()

    in_world(work)
    assert found[0] == found[1] != found[2]
    assert not found[0].exists()


def test_those_who_are_killed_are_refused_those_without_power_are_silent() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        await asyncio.sleep(1)
        world.kill(two)
        with pytest.raises((DialError, OSError)):
            await ask(world, one, two)
        world.power_off(two)
        assert two.state is State.DARK
        world.start(two)
        await asyncio.sleep(1)
        assert await ask(world, one, two) == b"hello"

    assert in_world(work).failures == []


def test_what_a_host_was_doing_for_a_workload_ends_with_it() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        await asyncio.sleep(1)
        two.condition.lie = "silent"
        asking = asyncio.get_running_loop().create_task(ask(world, one, two, timeout_s=60.0))
        await asyncio.sleep(1)
        world.kill(one)
        with pytest.raises(HostDied):
            await asking
        with pytest.raises(HostDied):
            await world.on(one, asyncio.sleep(1))

    assert in_world(work).failures == []


def test_what_is_asked_of_a_host_runs_as_that_host() -> None:
    async def who() -> str:
        return HOST.get()

    async def work(world: World) -> None:
        one, _ = two_echoes(world)
        assert await world.on(one, who()) == "one"
        assert HOST.get() == ""

    in_world(work)


def test_a_kill_from_within_the_victim_comes_from_outside_at_the_next_turn() -> None:
    after: list[str] = []

    async def work(world: World) -> None:
        machine = world.add_host("m", "echo")
        world.start(machine)
        await asyncio.sleep(1)

        async def suicide() -> None:
            world.kill(machine)
            after.append("the callback goes on")
            await asyncio.sleep(0.001)
            after.append("and never comes back")

        with pytest.raises(HostDied):
            await world.on(machine, suicide())

    in_world(work)
    assert after == ["the callback goes on"]


def test_a_frozen_process_stands_still_and_goes_on_where_it_stood() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "ticking")
        world.start(machine)
        await asyncio.sleep(1.5)
        assert world.freeze(machine)
        assert not world.freeze(machine)
        await asyncio.sleep(10)
        assert world.thaw(machine)
        await asyncio.sleep(1.75)

    in_world(work)
    assert Ticking.said == [(1, 1.0), (1, 11.5), (1, 12.5)]


def test_a_machine_that_sleeps_is_silent_and_wakes_as_it_was() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        await asyncio.sleep(1)
        assert world.sleep(two)
        with pytest.raises((TimeoutError, DialError)):
            await ask(world, one, two, timeout_s=3.0)
        assert world.wake(two)
        assert await ask(world, one, two) == b"hello"
        assert cast(EchoPeer, two.peer).starts == 1

    assert in_world(work).failures == []


def test_the_dead_of_a_frozen_or_sleeping_machine_stay_dead() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "ticking")
        for still in (world.freeze, world.sleep):
            world.start(machine)
            await asyncio.sleep(1.5)
            still(machine)
            world.kill(machine)
            assert not world.thaw(machine)
            assert not world.wake(machine)
            await asyncio.sleep(5)

    in_world(work)
    assert [incarnation for incarnation, _ in Ticking.said] == [1, 2]


def test_a_graceful_stop_lets_the_peer_finish_and_a_stop_before_the_first_line_is_one_too() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        world.stop(two)
        await asyncio.sleep(1)
        assert world.stop(one)
        assert not world.stop(one)
        assert one.state is State.STOPPING
        async with asyncio.timeout(5):
            await one.ended.wait()
            await two.ended.wait()
        assert one.state is two.state is State.IDLE
        assert world.start(one)

    assert in_world(work).failures == []


@pytest.mark.parametrize(
    ("kind", "said"), [("ending", "the peer ended by itself"), ("failing", "the cellar is flooded")]
)
def test_a_peer_that_ends_unasked_fails_the_run(kind: str, said: str) -> None:
    async def work(world: World) -> None:
        world.start(world.add_host("m", kind))
        await world.failed.wait()

    (failure,) = in_world(work).failures
    assert failure.host == "m"
    assert said in failure.text


def test_an_error_that_the_scenario_names_is_none() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "failing")
        world.start(machine)
        await machine.ended.wait()

    assert in_world(work, expected_errors=("the cellar",)).failures == []


def test_a_stopped_peer_s_leftovers_have_to_end() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "lingering")
        world.start(machine)
        await asyncio.sleep(1)
        world.stop(machine)
        await machine.ended.wait()

    (failure,) = in_world(work).failures
    assert "stubborn" in failure.text


def test_conditions_clocks_and_disks_are_as_the_faults_say() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("m", "echo", skew_s=10.0)
        world.start(machine)
        await asyncio.sleep(1)
        before = machine.wall_clock.now_s()
        world.step_clock(machine, -90.0)
        assert machine.wall_clock.now_s() == before - 90.0
        world.slow(machine, 4.0)
        world.fill_disk(machine, True)
        world.fill_memory(machine, True)
        world.lie(machine, "wrong")
        condition = machine.condition
        assert (condition.slow_factor, condition.is_memory_full, condition.lie) == (4.0, True, "wrong")
        assert machine.disk.is_full

    story = in_world(work).trace.story("m")
    assert [line.split(maxsplit=3)[3] for line in story][1:] == [
        "clock-step -90.0", "slow 4.0", "disk full", "memory full", "lie wrong", "kill",
    ]  # fmt: skip


def test_a_partition_separates_until_it_is_healed() -> None:
    async def work(world: World) -> None:
        one, two = two_echoes(world)
        await asyncio.sleep(1)
        number = world.partition(["one"], ["two"])
        with pytest.raises((TimeoutError, DialError)):
            await ask(world, one, two, timeout_s=3.0)
        world.heal(number)
        assert await ask(world, one, two) == b"hello"

    assert in_world(work).failures == []


def test_each_purpose_has_randomness_of_its_own() -> None:
    def drawn(purposes: tuple[str, ...]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}

        async def work(world: World) -> None:
            for purpose in purposes:
                found.setdefault(purpose, []).append(world.random(purpose).random())

        in_world(work)
        return found

    interleaved = drawn(("a", "b", "a", "b"))
    assert interleaved["a"] == drawn(("a", "a"))["a"]
    assert interleaved["a"][0] != interleaved["a"][1]
    assert generator(1, "a").random() == random.Random("1 a").random() != generator(2, "a").random()
