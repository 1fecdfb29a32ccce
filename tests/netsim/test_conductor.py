"""Moments befall real machines at their times. When which moment comes is test_schedule.py's."""

from __future__ import annotations

import asyncio
import typing

import pytest

from netsim.conductor import ACTIONS, Conductor
from netsim.scenario import FaultKind
from netsim.schedule import UNDONE_BY, Moment
from netsim.world import State, World
from tests.netsim.test_world import in_world

BETWEEN = {"partition", "heal", "reset", "degrade", "restore"}


def cut(world: World, source: str, target: str) -> bool:
    return world.fabric.is_cut(source, target, world.fabric.path(source, target))


def test_every_fault_of_a_scenario_and_what_undoes_it_has_a_meaning() -> None:
    kinds = {*typing.get_args(FaultKind), *UNDONE_BY.values(), "start"}
    assert kinds - BETWEEN <= set(ACTIONS)


def test_moments_come_at_their_times_and_one_that_does_not_apply_is_passed_over() -> None:
    seen: list[tuple[float, State]] = []

    async def work(world: World) -> None:
        machine = world.add_host("one", "echo")
        one = ("one",)
        moments = [
            Moment(1.0, "start", one),
            Moment(2.0, "thaw", one),
            Moment(3.0, "freeze", one),
            Moment(3.0, "stop", one),
        ]
        moments += [Moment(4.0, "thaw", one), Moment(5.0, "power-off", one), Moment(5.5, "kill", one)]
        conducted = asyncio.get_running_loop().create_task(Conductor(world, moments).run())
        for at_s in (0.9, 1.1, 2.1, 3.1, 4.1, 5.1, 5.4):
            await asyncio.sleep(at_s - world.now_s)
            seen.append((at_s, machine.state))
        assert not conducted.done()
        await conducted
        assert world.now_s == pytest.approx(5.5)
        assert machine.state is State.DARK

    in_world(work)
    running, frozen = State.RUNNING, State.FROZEN
    states = [State.IDLE, running, running, frozen, running, State.DARK, State.DARK]
    assert [state for _, state in seen] == states


def test_what_lasts_is_set_and_undone() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("one", "echo")
        world.start(machine)
        one = ("one",)
        worse = [("slow", 10.0, ""), ("fill-disk", 0.0, ""), ("fill-memory", 0.0, ""), ("lie", 0.0, "shape")]
        skew_s = machine.wall_clock.skew_s
        await Conductor(world, [Moment(0.0, "clock-step", one, amount=90.0)]).run()
        assert machine.wall_clock.skew_s == skew_s + 90.0
        await Conductor(world, [Moment(0.0, action, one, amount=much, how=how) for action, much, how in worse]).run()
        condition = machine.condition
        assert (condition.slow_factor, machine.disk.is_full, condition.is_memory_full, condition.lie) == (
            10.0, True, True, "shape"
        )  # fmt: skip
        await Conductor(world, [Moment(0.0, UNDONE_BY[action], one, amount=1.0) for action, _, _ in worse]).run()
        assert (condition.slow_factor, machine.disk.is_full, condition.is_memory_full, condition.lie) == (
            1.0, False, False, ""
        )  # fmt: skip

    in_world(work)


def test_a_host_that_comes_back_without_its_state_finds_an_empty_disk() -> None:
    async def work(world: World) -> None:
        machine = world.add_host("one", "echo")
        for keep_state, incarnation in ((True, 2), (False, 3)):
            world.start(machine)
            number = machine.disk.number
            start = Moment(world.now_s, "start", ("one",), keep_state=keep_state)
            await Conductor(world, [Moment(world.now_s, "kill", ("one",)), start]).run()
            assert machine.incarnation == incarnation
            assert (machine.disk.number == number) == keep_state

    in_world(work)


def test_partitions_are_healed_one_by_one_and_may_be_one_way() -> None:
    async def work(world: World) -> None:
        for name in ("one", "two", "three"):
            world.start(world.add_host(name, "echo"))
        both = Moment(0.0, "partition", ("one",), ("two",), amount=1.0)
        single = Moment(0.0, "partition", ("one",), ("three",), one_way=True, amount=2.0)
        healed = Moment(1.0, "heal", ("one",), ("three",), amount=2.0)
        conducted = asyncio.get_running_loop().create_task(Conductor(world, [both, single, healed]).run())
        await asyncio.sleep(0.5)
        assert (cut(world, "one", "three"), cut(world, "three", "one")) == (True, False)
        await conducted
        assert (cut(world, "one", "two"), cut(world, "two", "one"), cut(world, "one", "three")) == (True, True, False)

    in_world(work)


def test_a_path_is_worse_by_its_factor_and_loss_until_it_is_restored() -> None:
    async def work(world: World) -> None:
        for name in ("one", "two"):
            world.start(world.add_host(name, "echo"))
        before = world.fabric.path("one", "two")
        worse = Moment(0.0, "degrade", ("one",), ("two",), amount=3.0, loss=0.05)
        await Conductor(world, [worse]).run()
        assert world.fabric.path("two", "one").delay_s == before.delay_s * 3
        assert world.fabric.path("one", "two").loss == 0.05
        lossy = Moment(0.0, "degrade", ("one",), ("two",), loss=0.2, one_way=True)
        await Conductor(world, [Moment(0.0, "restore", ("one",), ("two",), amount=1.0), lossy]).run()
        assert world.fabric.path("two", "one") == before
        assert (world.fabric.path("one", "two").delay_s, world.fabric.path("one", "two").loss) == (before.delay_s, 0.2)

    in_world(work)
