"""One seed of one scenario: the world built, the schedule kept, the workload run, the checks made.

Owns what a run fails by: a check, an exception that nobody took, an error that was logged, a loop that stands still, more real
seconds than it was given. Knows peers and workloads by their contracts only. The same seed gives the same `Outcome`, but for
the real seconds and the memory.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from netsim.conductor import Conductor
from netsim.fabric import Card, Fabric
from netsim.fabric import Path as Route
from netsim.loop import HOST, NothingWillHappen, TimeStandsStill, VirtualLoop
from netsim.metrics import STATISTICS, Metrics
from netsim.null_channel import cheap_signatures
from netsim.outcome import Checked, Outcome
from netsim.paths import one_way_delay_s
from netsim.peers import UnknownKind, peer_class
from netsim.scenario import Links, Scenario, ScenarioError, load_scenario
from netsim.schedule import names_of, plan
from netsim.tables import TableError, did_you_mean, read_table
from netsim.trace import Trace
from netsim.workloads import UnknownWorkload, Workload, workload_class
from netsim.world import World, generator

PROGRESS_STEPS = 200
REAL_S_GIVEN_UP = 3.0
"""A run that took so many times the real seconds it was given is ended."""
STORIES_AT_MOST = 4
FAILURES_SAID = 10
BYTES_PER_MBIT = 125_000
ROUTES_CACHED = 1 << 16

OnProgress = Callable[[float, int], None]
"""Told the share of the virtual time that is over, and the callbacks run."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scenario whose names were all found: nothing about it can be wrong any more but what happens."""

    scenario: Scenario
    file: str
    workload: type[Workload]
    settings: Any
    group_settings: Mapping[str, Any]


def prepare(path: Path) -> Prepared:
    """Read a scenario and find everything that it names. Raises ScenarioError."""
    scenario = load_scenario(path)
    try:
        workload = workload_class(scenario.workload)
        settings = read_table(workload.SETTINGS, scenario.settings, "settings")
        group_settings = {
            name: read_table(peer_class(group.kind).SETTINGS, group.settings, f"hosts.{name}.settings")
            for name, group in scenario.hosts.items()
        }
        for metric in scenario.checks:
            _check_metric(metric, workload)
    except UnknownWorkload as error:
        raise ScenarioError(f"{path}: workload: {error}") from error
    except UnknownKind as error:
        raise ScenarioError(f"{path}: hosts: {error}") from error
    except TableError as error:
        raise ScenarioError(f"{path}: {error}") from error
    return Prepared(scenario, str(path), workload, settings, group_settings)


def _check_metric(metric: str, workload: type[Workload]) -> None:
    if not _is_told(metric, workload.METRICS):
        raise TableError(
            f"checks.{metric}", f"isn't measured by this workload; {did_you_mean(metric, workload.METRICS)}"
        )


def _is_told(metric: str, told: Mapping[str, str]) -> bool:
    """Whether METRICS has this name, itself or as a statistic of an observed one. ``name.*`` there covers a family."""
    plain, _, last = metric.rpartition(".")
    if metric in told or f"{plain}.*" in told:
        return True
    return last in STATISTICS and (plain in told or f"{plain.rpartition('.')[0]}.*" in told)


def run_seed(
    prepared: Prepared,
    seed: int,
    on_progress: OnProgress | None = None,
    on_line: Callable[[str], None] | None = None,
    *,
    is_timed: bool = True,
    is_last: bool = False,
    began_s: float | None = None,
) -> Outcome:
    """Run it in this thread, in a loop of its own.

    Args:
        prepared: What is run.
        seed: Of everything that is drawn.
        on_progress: Hears how far it is.
        on_line: Hears every line of the trace and of the log.
        is_timed: Where false, it may take as many real seconds as it likes.
        is_last: The process ends after it, by `os._exit`: the world is left standing, for taking thousands of hosts apart takes seconds.
        began_s: When the process began, by `time.perf_counter`; without it, now.
    """
    run = _Run(prepared, seed, on_progress, on_line, time.perf_counter() if began_s is None else began_s)
    run.is_timed = is_timed
    run.loop.is_left_standing = is_last
    handler = _LogToTrace(run, logging.INFO if on_line else logging.WARNING)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(handler.level)
    signatures = nullcontext() if prepared.scenario.is_noise else cheap_signatures()
    if is_last:
        _STANDING.append(run)
    gc.freeze()  # what was there before is no garbage of this run's, and looking through it takes a tenth of a second and more
    try:
        with signatures, asyncio.Runner(loop_factory=lambda: run.loop) as runner:
            try:
                runner.run(run.main())
            except (NothingWillHappen, TimeStandsStill) as error:
                run.fail("", f"{type(error).__name__}: {error}")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        run.remove_files()
        if is_last:
            gc.freeze()
        else:
            gc.unfreeze()
    return run.outcome()


_STANDING: list[_Run] = []
"""What a process that is about to end holds on to, lest it be taken apart."""


class _LogToTrace(logging.Handler):
    """What production logs goes to the story of its host; an error fails the run."""

    def __init__(self, run: _Run, level: int) -> None:
        super().__init__(level)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        if record.levelno >= logging.ERROR or record.exc_info:
            self._run.fail(HOST.get(), text)
        else:
            self._run.trace.note(HOST.get(), text)


class _Run:
    """The parts of one run while it lasts."""

    def __init__(
        self,
        prepared: Prepared,
        seed: int,
        on_progress: OnProgress | None,
        on_line: Callable[[str], None] | None,
        began_s: float,
    ) -> None:
        self.prepared = prepared
        self.seed = seed
        self.loop = VirtualLoop()
        self.trace = Trace(self.loop.time)
        self.trace.listener = on_line
        self.metrics = Metrics()
        self.is_timed = True
        self._on_progress = on_progress
        self._world: World | None = None
        self._early_failures: list[str] = []
        self._began_s = began_s
        self._core_began_s = time.process_time()
        self._hash = ""
        self._virtual_s = 0.0
        self._events = 0

    # --- the run ---

    async def main(self) -> None:
        scenario = self.prepared.scenario
        fabric = Fabric(self.trace, generator(self.seed, "fabric"))
        choose_path = _chosen_path(scenario.links, self.seed)
        fabric.set_default(choose_path)
        world = self._world = World(
            self.seed,
            self.loop,
            fabric,
            self.trace,
            choose_path,
            is_noise=scenario.is_noise,
            expected_errors=scenario.expected_errors,
        )
        self._add_hosts(world)
        workload = self.prepared.workload(world, self.prepared.settings, self.metrics)
        conductor = Conductor(world, plan(scenario, lambda purpose: generator(self.seed, purpose)))
        works = (("workload", workload.run()), ("conductor", conductor.run()), ("watch", self._watch(world)))
        tasks = [self.loop.create_task(work, name=name) for name, work in works]
        failed = self.loop.create_task(world.failed.wait(), name="failed")
        try:
            async with asyncio.timeout(scenario.duration_s):
                await _first_end(tasks[0], failed, *tasks[1:])
        except TimeoutError:
            self.trace.add("run", "", "the time is over")
            if not scenario.endless:
                world.fail("", f"the workload wasn't done after {scenario.duration_s:g} virtual seconds")
        except Exception:  # noqa: BLE001 - the supervision point of a run
            world.fail("", traceback.format_exc())
        finally:
            await _cancelled(*tasks, failed)
        gc.collect()  # exceptions that nobody took are noticed when their holders go
        self._hash, self._virtual_s, self._events = self.trace.hexdigest(), world.now_s, self.loop.events
        self.trace.close()
        world.close()

    def _add_hosts(self, world: World) -> None:
        links = self.prepared.scenario.links
        for group, told in self.prepared.scenario.hosts.items():
            draws = generator(self.seed, f"hosts {group}")
            for name in names_of(self.prepared.scenario, group):
                nat = draws.choices(list(told.nat), list(told.nat.values()))[0] if told.nat else "open"
                world.add_host(
                    name,
                    told.kind,
                    group=group,
                    nat=nat,
                    card=Card(
                        _drawn(draws, told.uplink_mbit or links.uplink_mbit),
                        _drawn(draws, told.downlink_mbit or links.downlink_mbit),
                        send_buffer_bytes=links.send_buffer_kib << 10,
                        receive_window_bytes=links.receive_window_kib << 10,
                    ),
                    skew_s=draws.uniform(*told.clock_skew_s),
                    settings=self.prepared.group_settings[group],
                    disk_flush_s=told.disk_flush_s,
                )

    async def _watch(self, world: World) -> None:
        """Says how far it is, and ends what went wrong or takes far too long. The same events whether anybody looks or not."""
        scenario = self.prepared.scenario
        for step in range(1, PROGRESS_STEPS + 1):
            await asyncio.sleep(scenario.duration_s / PROGRESS_STEPS)
            if self._on_progress is not None:
                self._on_progress(step / PROGRESS_STEPS, self.loop.events)
            if self.loop.failures:
                world.failed.set()
            took_s = self._counted(*self._took())
            if self.is_timed and took_s > REAL_S_GIVEN_UP * scenario.real_s_max:
                world.fail("", f"given up after {took_s:.0f} s; it was given {scenario.real_s_max:.0f}")

    def fail(self, host: str, text: str) -> None:
        if self._world is not None:
            self._world.fail(host, text)
        else:
            self._early_failures.append(text)

    def remove_files(self) -> None:
        """Also of a run that was interrupted, in a process that leaves its world standing."""
        if self._world is not None:
            self._world.remove_files()

    # --- what came of it ---

    def _took(self) -> tuple[float, float]:
        """Seconds of a core, and by the clock."""
        return time.process_time() - self._core_began_s, time.perf_counter() - self._began_s

    def _counted(self, real_s: float, wall_s: float) -> float:
        """What is held against the bound: seconds of a core, which don't grow by who else is on the machine; of a run that has the
        machine to itself, what somebody who waits for it sees.
        """
        return max(real_s, wall_s) if self.prepared.scenario.alone else real_s

    def outcome(self) -> Outcome:
        scenario = self.prepared.scenario
        real_s, wall_s = self._took()
        numbers = self.metrics.numbers()
        failures = self._failures(numbers, real_s, wall_s)
        checks = tuple(self._checked(metric, numbers) for metric in scenario.checks)
        return Outcome(
            scenario.name,
            self.prepared.file,
            self.seed,
            numbers,
            checks,
            tuple(failures),
            self._stories([check for check in checks if not check.holds]),
            self._hash or self.trace.hexdigest(),  # of a run that the loop itself ended: as far as it came
            self.trace.lines,
            self._events,
            self._virtual_s,
            real_s,
            peak_rss_mib(),
            self.metrics.series(),
            self.metrics.observations(),
            tuple(mark for mark in self._world.marks if mark[0] < self._virtual_s) if self._world is not None else (),
            wall_s,
        )

    def _stories(self, broken: Sequence[Checked]) -> dict[str, tuple[str, ...]]:
        """Of those whom failures and broken checks name; and the run's own ("") where one names nobody of whom anything is known."""
        names = [failure.host for failure in self._world.failures] if self._world is not None else []
        names += [failure.host for failure in self.loop.failures]
        names += [next(filter(self.trace.story, check.culprits), "") for check in broken]
        is_runs_own = not all(names)
        names += [name for check in broken for name in check.culprits]
        told = [name for name in dict.fromkeys(names) if name and self.trace.story(name)][:STORIES_AT_MOST]
        return {name: self.trace.story(name) for name in told + [""] * is_runs_own}

    def _failures(self, numbers: Mapping[str, float], real_s: float, wall_s: float) -> list[str]:
        world = self._world
        found = list(self._early_failures)
        if world is not None:
            found += [f"{failure.host or 'world'}: {failure.text}" for failure in world.failures]
        found += [str(failure) for failure in self.loop.failures[:FAILURES_SAID]]
        unknown = [name for name in numbers if not _is_told(name, self.prepared.workload.METRICS)]
        if unknown:
            found.append(f"the workload measures what its METRICS don't name: {', '.join(unknown)}")
        if self.metrics.dropped:
            found.append(f"{self.metrics.dropped} observations were more than are kept")
        scenario = self.prepared.scenario
        if self.is_timed and self._counted(real_s, wall_s) > scenario.real_s_max:
            clock = f", {wall_s:.1f} s by the clock" if scenario.alone else ""
            found.append(f"took {real_s:.1f} s of a core{clock}; it was given {scenario.real_s_max:g}")
        if scenario.rss_mib_max is not None and peak_rss_mib() > scenario.rss_mib_max:
            found.append(f"took {peak_rss_mib():,.0f} MiB; it was given {scenario.rss_mib_max:,.0f}")
        return found

    def _checked(self, metric: str, numbers: Mapping[str, float]) -> Checked:
        bound, value = self.prepared.scenario.checks[metric], numbers.get(metric)
        holds = bound.holds(value)
        too_high = value is not None and bound.max is not None and value > bound.max
        culprits = () if holds else self.metrics.culprits(metric, too_high=too_high)
        return Checked(metric, str(bound), value, holds, culprits)


async def _first_end(workload: asyncio.Task[None], failed: asyncio.Task[Any], *others: asyncio.Task[None]) -> None:
    """Returns when the workload has ended or the run failed; raises what the workload or one of the others raised."""
    waiting = {workload, failed, *others}
    while not workload.done() and not failed.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _drawn(draws: Any, mbit: Sequence[float]) -> float | None:
    """One of some rates, in bytes a second; None where there are none: unlimited."""
    return draws.choice(mbit) * BYTES_PER_MBIT if mbit else None


def _chosen_path(links: Links, seed: int) -> Callable[[str, str], Route]:
    usual = Route(
        jitter_s=links.jitter_ms / 1000,
        loss=links.loss,
        bytes_per_s=None if links.path_mbit is None else links.path_mbit * BYTES_PER_MBIT,
        queue_bytes=links.path_queue_kib << 10,
    )

    @lru_cache(maxsize=ROUTES_CACHED)
    def choose(one: str, other: str) -> Route:
        return replace(usual, delay_s=one_way_delay_s(links, seed, one, other))

    return choose


def peak_rss_mib() -> float:
    """Of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
