"""The machines of a run and what happens to them: starts, kills, power cuts, freezes, restarts, wrong clocks, full disks.

Owns the life of every peer (this is the supervision point: an exception out of one fails the run) and the seeded generators.
A kill is: nothing the process does reaches anybody any more, and only then is it cancelled. Knows no workload, and of peers only
what `netsim.peers.Peer` says.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - seeded generators, never the global one
import traceback
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from netsim.link_fabric import Card, Fabric
from netsim.loop import VirtualLoop
from netsim.peers import peer_class
from netsim.ports import Disk, SimWallClock
from netsim.sim_host import Machine, SimHost, State
from netsim.trace import Trace

__all__ = ["Failure", "HostDied", "Machine", "SimHost", "State", "World", "generator"]

CLEAN_UP_S_MAX = 120.0
"""Virtual seconds in which everything of a killed process must have ended."""
FAILURES_AT_MOST = 16
Result = TypeVar("Result")


class HostDied(Exception):
    """The machine on which something was to be done isn't running, or died meanwhile."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that must not happen in any run."""

    host: str
    text: str


def generator(seed: int, purpose: str) -> random.Random:
    """The same for the same two, whatever else is drawn."""
    return random.Random(f"{seed} {purpose}")


class World:
    """See the module. Everything is for the loop's thread."""

    def __init__(self, seed: int, loop: VirtualLoop, fabric: Fabric, trace: Trace, *, is_noise: bool = True) -> None:
        self.seed = seed
        self.is_noise = is_noise
        """Whether peers are to run the real handshake, or the null channel."""
        self.loop = loop
        self.fabric = fabric
        self.trace = trace
        self.machines: dict[str, Machine] = {}
        self.failures: list[Failure] = []
        self.failed = asyncio.Event()
        self._started_at = loop.time()
        self._generators: dict[str, random.Random] = {}
        self._groups: dict[str, list[Machine]] = {}
        self._burials = 0

    @property
    def now_s(self) -> float:
        """Virtual seconds since the run began."""
        return self.loop.time() - self._started_at

    def random(self, purpose: str) -> random.Random:
        """The generator of one purpose: the same object each time, so its draws go on."""
        found = self._generators.get(purpose)
        if found is None:
            found = self._generators[purpose] = generator(self.seed, purpose)
        return found

    # --- machines ---

    def add_host(
        self,
        name: str,
        kind: str,
        *,
        group: str = "",
        card: Card | None = None,
        nat: str = "open",
        skew_s: float = 0.0,
        settings: Any = None,
        disk_flush_s: float = 0.0,
    ) -> Machine:
        """A machine with nothing running on it yet. Raises UnknownKind."""
        if name in self.machines:
            raise ValueError(f"there is a host {name!r} already")
        chosen = peer_class(kind).SETTINGS() if settings is None else settings
        address, boxes = _addresses(len(self.machines), nat)
        now = self.loop.time
        machine = Machine(name, address, group, kind, chosen, Disk(now, disk_flush_s), SimWallClock(now, skew_s))
        machine.ended.set()
        self.fabric.add_host(name, address, card or Card(), boxes)
        self.machines[name] = machine
        self._groups.setdefault(group, []).append(machine)
        return machine

    def group(self, name: str) -> Sequence[Machine]:
        """The machines of a group, in the order in which they were added."""
        return self._groups.get(name, ())

    def alive(self, group: str | None = None) -> list[Machine]:
        """Machines that are running (not frozen, not stopping), of one group or all."""
        found = self.machines.values() if group is None else self.group(group)
        return [machine for machine in found if machine.state is State.RUNNING]

    async def on(self, machine: Machine, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` as that machine's process would. Raises HostDied, and whatever ``work`` raises."""
        if not machine.is_alive:
            work.close()
            raise HostDied(machine.name)
        context = self.loop.context_of(machine.name)
        task = self.loop.create_task(work, name=f"{machine.name} asked", context=context)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise HostDied(machine.name)
        result: Result = task.result()
        return result

    # --- what happens to them ---

    def start(self, machine: Machine) -> bool:
        """Power it where needed, and start its peer. False when it runs already."""
        if machine.is_alive:
            return False
        if machine.state is State.DARK:
            self.fabric.power_on(machine.name)
        self.loop.forget(machine.name)  # ghosts of the last incarnation have their context, the new one another
        host = machine.boot(self, self.loop.time, self.fabric.transport(machine.name))
        self._set_state(machine, State.RUNNING, f"start {machine.incarnation}")
        machine.ended.clear()
        machine.life = self.loop.create_task(
            self._live(machine, host), name=f"{machine.name} life", context=self.loop.context_of(machine.name)
        )
        return True

    def kill(self, machine: Machine) -> bool:
        """SIGKILL: the kernel resets its connections. False when nothing runs."""
        if not machine.is_alive:
            return False
        self.fabric.process_died(machine.name)
        self._bury(machine, State.IDLE, "kill")
        return True

    def power_off(self, machine: Machine) -> bool:
        """The plug is pulled: nobody is told. False when it was dark already."""
        if machine.state is State.DARK:
            return False
        self.fabric.power_off(machine.name)
        machine.disk.power_cut()
        if machine.is_alive:
            self._bury(machine, State.DARK, "power-off")
        else:
            self._set_state(machine, State.DARK, "power-off")
        return True

    def restart(self, machine: Machine, keep_state: bool = True) -> bool:
        """A new incarnation; what still runs is killed first."""
        self.kill(machine)
        if not keep_state:
            machine.disk.wipe()
        return self.start(machine)

    def stop(self, machine: Machine) -> bool:
        """Ask it to stop in good order; `machine.ended` is set when it has. False when it isn't running."""
        if machine.state is not State.RUNNING:
            return False
        self._set_state(machine, State.STOPPING, "stop")
        if machine.peer is not None:
            self.loop.call_soon(machine.peer.request_stop, context=self.loop.context_of(machine.name))
        elif machine.life is not None:
            machine.life.cancel()
        return True

    def freeze(self, machine: Machine) -> bool:
        """The process stands still; its kernel goes on. False when it isn't running."""
        if machine.state is not State.RUNNING:
            return False
        self._set_state(machine, State.FROZEN, "freeze")
        self.loop.freeze(machine.name)
        return True

    def thaw(self, machine: Machine) -> bool:
        """The process goes on where it stood. False when it wasn't frozen."""
        if machine.state is not State.FROZEN:
            return False
        self._set_state(machine, State.RUNNING, "thaw")
        self.loop.thaw(machine.name)
        return True

    def step_clock(self, machine: Machine, seconds: float) -> None:
        """Somebody sets its wall clock."""
        machine.wall_clock.skew_s += seconds
        self.trace.add("fault", machine.name, f"clock-step {seconds!r}")

    def slow(self, machine: Machine, factor: float) -> None:
        """Its device takes ``factor`` times as long from now on; 1 is as before."""
        machine.condition.slow_factor = factor
        self.trace.add("fault", machine.name, f"slow {factor!r}")

    def fill_disk(self, machine: Machine, full: bool) -> None:
        machine.disk.is_full = full
        self.trace.add("fault", machine.name, f"disk {'full' if full else 'free'}")

    def fill_memory(self, machine: Machine, full: bool) -> None:
        machine.condition.is_memory_full = full
        self.trace.add("fault", machine.name, f"memory {'full' if full else 'free'}")

    def lie(self, machine: Machine, how: str) -> None:
        """From now on it lies, in one of its kind's ways; an empty ``how`` ends that."""
        machine.condition.lie = how
        self.trace.add("fault", machine.name, f"lie {how or 'no more'}")

    def partition(self, sources: Collection[str], targets: Collection[str], *, both_ways: bool = True) -> int:
        """Nothing passes between two sets of hosts; gives the number to heal it by."""
        number = self.fabric.partition(sources, targets, both_ways=both_ways)
        way = "both ways" if both_ways else "one way"
        self.trace.add("fault", "", f"partition {number} {len(sources)} {len(targets)} {way}")
        return number

    def heal(self, number: int) -> None:
        self.fabric.heal(number)
        self.trace.add("fault", "", f"heal {number}")

    # --- lives ---

    async def _live(self, machine: Machine, host: SimHost) -> None:
        """One incarnation, from its first line to its end."""
        try:
            machine.peer = peer = peer_class(machine.kind)(host, machine.settings)
            await peer.run()
            reason = "ended"
        except asyncio.CancelledError:
            if machine.host is host and machine.state is not State.STOPPING:
                self.fail(machine.name, "the peer was cancelled by something of its own")
            reason = "cancelled"
        except Exception as error:  # noqa: BLE001 - the supervision point of a simulated process
            self.fail(machine.name, _told(error))
            reason = type(error).__name__
        if machine.host is host:
            self.fabric.process_died(machine.name)
            self._leave(machine, State.IDLE, f"exit {reason}")
            self._expect_end(machine, self.loop.tasks_of(machine.name))

    def _leave(self, machine: Machine, state: State, why: str) -> None:
        """The process is gone, as everybody else sees it."""
        host = machine.host
        if host is not None:
            host.storage.detach()
            host.transport.detach()
        machine.host = machine.peer = machine.life = None
        self._set_state(machine, state, why)
        machine.ended.set()

    def _bury(self, machine: Machine, state: State, why: str) -> None:
        """After the fabric let go of it: detach the rest, cancel what ran, and see that it ends."""
        was_frozen = machine.state is State.FROZEN
        self._leave(machine, state, why)
        tasks = self.loop.tasks_of(machine.name)
        for task in tasks:
            task.cancel()
        if was_frozen:
            self.loop.thaw(machine.name)
        self._expect_end(machine, tasks)

    def _expect_end(self, machine: Machine, tasks: Sequence[asyncio.Task[Any]]) -> None:
        mine = asyncio.current_task()
        left = [task for task in tasks if task is not mine and not task.done()]
        if left:
            self._burials += 1
            nobody = self.loop.context_of("")
            self.loop.call_later(
                CLEAN_UP_S_MAX, self._look_at_grave, machine, machine.incarnation, left, context=nobody
            )

    def _look_at_grave(self, machine: Machine, incarnation: int, tasks: Sequence[asyncio.Task[Any]]) -> None:
        self._burials -= 1
        left = [task.get_name() for task in tasks if not task.done()]
        if not left:
            return
        if machine.state is State.FROZEN:  # its ghosts stand still with it
            self._expect_end(machine, tasks)
        else:
            number = f"{machine.name}#{incarnation}"
            self.fail(
                machine.name, f"{CLEAN_UP_S_MAX:.0f} s after the end of {number} there still run: {', '.join(left)}"
            )

    def _set_state(self, machine: Machine, state: State, why: str) -> None:
        machine.state = state
        self.trace.add("fault", machine.name, why)

    # --- the end ---

    def fail(self, host: str, text: str) -> None:
        """The run has failed, whatever its checks say."""
        self.trace.note(host, text)
        if len(self.failures) < FAILURES_AT_MOST:
            self.failures.append(Failure(host, text))
        self.failed.set()

    async def close(self) -> None:
        """Kill everything and wait until it ended; nothing of it counts in the trace any more."""
        lives: list[asyncio.Task[Any]] = []
        for machine in self.machines.values():
            lives += self.loop.tasks_of(machine.name)
            if machine.is_alive:
                self.kill(machine)
        pending = [task for task in lives if not task.done()]
        if pending:
            _, left = await asyncio.wait(pending, timeout=CLEAN_UP_S_MAX)
            if left:
                names = ", ".join(task.get_name() for task in pending if not task.done())
                self.fail("", f"{CLEAN_UP_S_MAX:.0f} s after the end of the run there still run: {names}")


def _told(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "".join(lines)


def _addresses(index: int, nat: str) -> tuple[str, tuple[Any, ...]]:
    """A host's own address and what it sits behind. Public ones lie in /16 networks of their own (20.0 to 99.255)."""
    public = f"{20 + index % 80}.{index // 80 % 256}.{1 + index // 20480}.1"
    if nat == "open":
        return public, ()
    home = f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"
    raise NotImplementedError(home)
