"""The machines of a run and what happens to them: starts, kills, power cuts, freezes, restarts, wrong clocks, full disks.

Owns the life of every peer (this is the supervision point: an exception out of one fails the run) and the seeded generators.
A killed process stands still for ever: nothing of it runs again, its clean-up neither. What befalls a machine befalls it from
outside, never in the middle of its own callback. Knows no workload, and of peers only
what `netsim.peers.Peer` says.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - seeded generators, never the global one
import traceback
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from netsim.fabric import Card, Fabric
from netsim.fabric import Path as Route
from netsim.loop import HOST, VirtualLoop
from netsim.nat import NatBox, site
from netsim.peers import peer_class
from netsim.ports import Disk, SimWallClock
from netsim.sim_host import LISTEN_PORT, Machine, SimHost, State
from netsim.trace import Trace

__all__ = ["Failure", "HostDied", "Machine", "SimHost", "State", "World", "generator"]

CLEAN_UP_S_MAX = 60.0
"""Virtual seconds in which what a stopped peer left running must have ended, once cancelled."""
EXECUTOR_DELAY_S = (0.0, 0.002)
"""What a job waits for its thread."""
FAILURES_AT_MOST = 16
MARKS_AT_MOST = 10_000
Result = TypeVar("Result")
ChoosePath = Callable[[str, str], Route]
"""The path from one host to another, as the scenario draws it."""


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

    def __init__(
        self,
        seed: int,
        loop: VirtualLoop,
        fabric: Fabric,
        trace: Trace,
        choose_path: ChoosePath,
        *,
        is_noise: bool = True,
        expected_errors: Sequence[str] = (),
    ) -> None:
        self.seed = seed
        self.choose_path = choose_path
        self.is_noise = is_noise
        """Whether peers are to run the real handshake, or the null channel."""
        self.loop = loop
        self.fabric = fabric
        self.trace = trace
        self.machines: dict[str, Machine] = {}
        self.failures: list[Failure] = []
        self.marks: list[tuple[float, str]] = []
        """When what befell whom: the first `MARKS_AT_MOST`."""
        self.failed = asyncio.Event()
        self._expected_errors = tuple(expected_errors)
        self._directory: TemporaryDirectory[str] | None = None
        self._started_at = loop.time()
        self._generators: dict[str, random.Random] = {}
        self._groups: dict[str, list[Machine]] = {}
        loop.executor_delay_s = lambda host: self.random(f"{host} threads").uniform(*EXECUTOR_DELAY_S)

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

    def spawn(self, machine: Machine, work: Coroutine[Any, Any, Result], name: str = "asked") -> asyncio.Task[Result]:
        """Start ``work`` as that machine's process would. Raises HostDied when none runs."""
        if not machine.is_alive:
            work.close()
            raise HostDied(machine.name)
        context = self.loop.context_of(machine.name)
        return self.loop.create_task(work, name=f"{machine.name} {name}", context=context)

    async def on(self, machine: Machine, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` as that machine's process would. Raises HostDied, and whatever ``work`` raises."""
        task, host = self.spawn(machine, work), machine.host
        waiting: list[asyncio.Future[Any]] = [task] if host is None else [task, host.over]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done() or task.cancelled():
            raise HostDied(machine.name)
        return task.result()

    # --- what happens to them ---

    def start(self, machine: Machine) -> bool:
        """Power it where needed, and start its peer. False when it runs already."""
        if machine.is_alive:
            return False
        if machine.state is State.DARK:
            self.fabric.power_on(machine.name)
        self.loop.forget(machine.name)
        host = machine.boot(self, self.loop.time, self.fabric.transport(machine.name))
        self._set_state(machine, State.RUNNING, f"start {machine.incarnation}")
        machine.ended.clear()
        self.spawn(machine, self._live(machine, host), "life")
        return True

    def kill(self, machine: Machine) -> bool:
        """SIGKILL: the kernel ends its connections. False when nothing runs."""
        if not machine.is_alive:
            return False
        if not self._postponed(self.kill, machine):
            self.fabric.process_died(machine.name)
            self._over(machine, State.IDLE, "kill")
        return True

    def power_off(self, machine: Machine) -> bool:
        """The plug is pulled: nobody is told. False when it was dark already."""
        if machine.state is State.DARK:
            return False
        if not self._postponed(self.power_off, machine):
            self.fabric.power_off(machine.name)
            machine.disk.power_cut()
            self._over(machine, State.DARK, "power-off")
        return True

    def restart(self, machine: Machine, keep_state: bool = True) -> bool:
        """A new incarnation; what still runs is killed first."""
        if self._postponed(self.restart, machine, keep_state):
            return True
        self.kill(machine)
        if not keep_state:
            machine.disk.wipe()
        return self.start(machine)

    def stop(self, machine: Machine) -> bool:
        """Ask it to stop in good order; `machine.ended` is set when it has. False when it isn't running."""
        if machine.state is not State.RUNNING:
            return False
        self._set_state(machine, State.STOPPING, "stop")
        self.loop.call_soon(self._request_stop, machine, machine.host, context=self.loop.context_of(machine.name))
        return True

    def freeze(self, machine: Machine) -> bool:
        """The process stands still; its kernel goes on. False when it isn't running."""
        if machine.state is not State.RUNNING:
            return False
        if not self._postponed(self.freeze, machine):
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

    def sleep(self, machine: Machine) -> bool:
        """The lid is closed: the process stands still, and nothing reaches or leaves the machine. False when it isn't running."""
        if machine.state is not State.RUNNING:
            return False
        if not self._postponed(self.sleep, machine):
            self._set_state(machine, State.ASLEEP, "sleep")
            self.fabric.sleep(machine.name)
            self.loop.freeze(machine.name)
        return True

    def wake(self, machine: Machine) -> bool:
        """The lid is opened. False when it wasn't asleep."""
        if machine.state is not State.ASLEEP:
            return False
        self._set_state(machine, State.RUNNING, "wake")
        self.fabric.wake(machine.name)
        self.loop.thaw(machine.name)
        return True

    def step_clock(self, machine: Machine, seconds: float) -> None:
        """Somebody sets its wall clock."""
        machine.wall_clock.skew_s += seconds
        self._mark(machine.name, f"clock-step {seconds!r}")

    def slow(self, machine: Machine, factor: float) -> None:
        """Its device takes ``factor`` times as long from now on; 1 is as before."""
        machine.condition.slow_factor = factor
        self._mark(machine.name, f"slow {factor!r}")

    def fill_disk(self, machine: Machine, full: bool) -> None:
        machine.disk.is_full = full
        self._mark(machine.name, f"disk {'full' if full else 'free'}")

    def fill_memory(self, machine: Machine, full: bool) -> None:
        machine.condition.is_memory_full = full
        self._mark(machine.name, f"memory {'full' if full else 'free'}")

    def lie(self, machine: Machine, how: str) -> None:
        """From now on it lies, in one of its kind's ways; an empty ``how`` ends that."""
        machine.condition.lie = how
        self._mark(machine.name, f"lie {how or 'no more'}")

    def partition(self, sources: Collection[str], targets: Collection[str], *, both_ways: bool = True) -> int:
        """Nothing passes between two sets of hosts; gives the number to heal it by."""
        number = self.fabric.partition(sources, targets, both_ways=both_ways)
        way = "both ways" if both_ways else "one way"
        self._mark("", f"partition {number} {len(sources)} {len(targets)} {way}")
        return number

    def heal(self, number: int) -> None:
        self.fabric.heal(number)
        self._mark("", f"heal {number}")

    def reset(self, ones: Collection[str], others: Collection[str]) -> None:
        """Every connection between two sets of hosts is reset."""
        self._mark("", f"reset {len(ones)} {len(others)}")
        for one in ones:
            for other in others:
                self.fabric.reset(one, other)

    def degrade(
        self, sources: Collection[str], targets: Collection[str], factor: float, loss: float, *, both_ways: bool = True
    ) -> None:
        """Paths get so many times their delay, and lose at least ``loss``; factor 1 and loss 0 are as at first."""
        self._mark("", f"degrade {len(sources)} {len(targets)} {factor!r} {loss!r} {both_ways}")
        for source in sources:
            for target in targets:
                for one, other in ((source, target), (target, source))[: 2 if both_ways else 1]:
                    path = self.choose_path(one, other)
                    worse = replace(path, delay_s=path.delay_s * factor, loss=max(path.loss, loss))
                    self.fabric.set_path(one, other, worse)

    # --- lives ---

    def _postponed(self, act: Callable[..., object], *arguments: Any) -> bool:
        """Whether this was called from within some host's callback: then ``act`` comes at the next turn, from outside."""
        if not HOST.get():
            return False
        self.loop.call_soon(act, *arguments, context=self.loop.context_of(""))
        return True

    def _request_stop(self, machine: Machine, host: SimHost | None) -> None:
        if machine.peer is not None and machine.host is host:
            machine.peer.request_stop()

    async def _live(self, machine: Machine, host: SimHost) -> None:
        """One incarnation, from its first line to its end."""
        reason = "ended"
        try:
            if not machine.is_stopping:  # else it was asked to stop before it began
                machine.peer = peer = peer_class(machine.kind)(host, machine.settings)
                await peer.run()
                if not machine.is_stopping:
                    self.fail(machine.name, "the peer ended by itself")
        except asyncio.CancelledError:
            self.fail(machine.name, "the peer was cancelled by something of its own")
        except Exception as error:  # noqa: BLE001 - the supervision point of a simulated process
            reason = type(error).__name__
            if machine.host is host:
                self.fail(machine.name, _told(error))
        if machine.host is not host:
            return  # killed, and only now taken apart
        await self._end_rest(machine)
        self.loop.call_soon(self._exited, machine, host, reason, context=self.loop.context_of(""))

    async def _end_rest(self, machine: Machine) -> None:
        """As the end of `asyncio.run`: what the peer left running is cancelled, and has to end."""
        mine = asyncio.current_task()
        left = [task for task in self.loop.tasks_of(machine.name) if task is not mine]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CLEAN_UP_S_MAX)
        names = ", ".join(task.get_name() for task in left if not task.done())
        if names:
            self.fail(machine.name, f"{CLEAN_UP_S_MAX:.0f} s after the end of the peer there still run: {names}")

    def _exited(self, machine: Machine, host: SimHost, reason: str) -> None:
        if machine.host is host:
            self.fabric.process_died(machine.name)
            self._over(machine, State.IDLE, f"exit {reason}")

    def _over(self, machine: Machine, state: State, why: str) -> None:
        """After the fabric let go of it: nothing of the process runs again."""
        self.loop.mute(machine.name)
        if machine.state is State.ASLEEP:
            self.fabric.wake(machine.name)
        host = machine.host
        machine.host = machine.peer = None
        self._set_state(machine, state, why)
        machine.ended.set()
        if host is not None:
            host.storage.detach()
            host.over.set_result(None)

    def _set_state(self, machine: Machine, state: State, why: str) -> None:
        machine.state = state
        self._mark(machine.name, why)

    def _mark(self, host: str, text: str) -> None:
        self.trace.add("fault", host, text)
        if len(self.marks) < MARKS_AT_MOST:
            self.marks.append((self.now_s, text.partition(" ")[0]))

    # --- the end ---

    def fail(self, host: str, text: str) -> None:
        """The run has failed, whatever its checks say; unless the scenario names this error."""
        self.trace.note(host, f"FAILED: {(text.strip().splitlines() or [''])[-1]}", of_the_run=True)
        if any(expected in text for expected in self._expected_errors):
            return
        if len(self.failures) < FAILURES_AT_MOST:
            self.failures.append(Failure(host, text))
        self.failed.set()

    @property
    def directory(self) -> Path:
        """For real files, made when somebody asks; gone with the run. Its name differs from run to run: no trace may hold it."""
        if self._directory is None:
            self._directory = TemporaryDirectory(prefix="netsim-")
        return Path(self._directory.name)

    def close(self) -> None:
        """Kill everything: the run is over."""
        for machine in self.machines.values():
            self.kill(machine)
        self.remove_files()

    def remove_files(self) -> None:
        """What `directory` holds; once more does nothing. For runs that end without `close`, too."""
        if self._directory is not None:
            self._directory.cleanup()


def _told(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "".join(lines)


def _addresses(index: int, nat: str) -> tuple[str, tuple[NatBox, ...]]:
    """A host's own address and what it sits behind. Public ones lie in /16 networks of their own (20.0 to 99.255)."""
    public = f"{20 + index % 80}.{index // 80 % 256}.{1 + index // 20480}.1"
    return site(nat, public, f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", LISTEN_PORT)
