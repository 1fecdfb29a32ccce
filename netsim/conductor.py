"""Makes the schedule's moments happen to the world, each at its time.

Owns the meaning of an action's name. A host that isn't in the state that an action wants (it is dead already, say) is passed
over: schedules are drawn without knowing what else will happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from netsim.schedule import Moment
from netsim.world import Machine, World

Action = Callable[[World, Machine, Moment], object]


def _start(world: World, machine: Machine, moment: Moment) -> None:
    if not moment.keep_state and not machine.is_alive:
        machine.disk.wipe()
    world.start(machine)


ACTIONS: Mapping[str, Action] = {
    "start": _start,
    "kill": lambda world, machine, moment: world.kill(machine),
    "power-off": lambda world, machine, moment: world.power_off(machine),
    "stop": lambda world, machine, moment: world.stop(machine),
    "restart": lambda world, machine, moment: world.restart(machine, moment.keep_state),
    "freeze": lambda world, machine, moment: world.freeze(machine),
    "thaw": lambda world, machine, moment: world.thaw(machine),
    "sleep": lambda world, machine, moment: world.sleep(machine),
    "wake": lambda world, machine, moment: world.wake(machine),
    "clock-step": lambda world, machine, moment: world.step_clock(machine, moment.amount),
    "slow": lambda world, machine, moment: world.slow(machine, moment.amount),
    "fill-disk": lambda world, machine, moment: world.fill_disk(machine, True),
    "free-disk": lambda world, machine, moment: world.fill_disk(machine, False),
    "fill-memory": lambda world, machine, moment: world.fill_memory(machine, True),
    "free-memory": lambda world, machine, moment: world.fill_memory(machine, False),
    "lie": lambda world, machine, moment: world.lie(machine, moment.how),
    "honest": lambda world, machine, moment: world.lie(machine, ""),
}


class Conductor:
    """One run's moments, in the order of their times."""

    def __init__(self, world: World, moments: Sequence[Moment]) -> None:
        self._world = world
        self._moments = moments
        self._partitions: dict[float, int] = {}

    async def run(self) -> None:
        """Returns when the last moment has come."""
        for moment in self._moments:
            wait_s = moment.at_s - self._world.now_s
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._apply(moment)

    def _apply(self, moment: Moment) -> None:
        world = self._world
        if moment.action == "partition":
            number = world.partition(moment.hosts, moment.others, both_ways=not moment.one_way)
            self._partitions[moment.amount] = number
        elif moment.action == "heal":
            world.heal(self._partitions.pop(moment.amount))
        elif moment.action == "reset":
            world.reset(moment.hosts, moment.others)
        elif moment.action in ("degrade", "restore"):
            factor = moment.amount if moment.action == "degrade" else 1.0
            world.degrade(moment.hosts, moment.others, factor or 1.0, moment.loss, both_ways=not moment.one_way)
        else:
            for name in moment.hosts:
                ACTIONS[moment.action](world, world.machines[name], moment)
