"""Runs in processes of their own: many seeds side by side, and one seed twice to compare.

Owns how a child is started, which of them share the machine, and what a child's death means; a child prints its `Outcome` as one
line of JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from netsim.outcome import Outcome

HASH_SEEDS = ("1", "2")
LAST_LINES = 12
WALL_S_PER_CORE_S = 20.0
"""A crowded machine may take so many times the seconds of a core that a run is given."""
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """One run to be made."""

    file: str
    seed: int
    real_s_max: float
    hash_seed: str = ""
    plots: str = ""
    is_timed: bool = True
    is_alone: bool = False
    """Whether nothing else may run meanwhile: cores share caches, and often two of them are one."""


OnChange = Callable[[Sequence[Task], Sequence[Task]], None]
OnDone = Callable[[Task, Outcome], None]
Run = Callable[[Task], Outcome]


def run_process(task: Task) -> Outcome:
    """Run a seed in a process of its own and wait for it."""
    command = [sys.executable, "-m", "netsim", "run", task.file, "--seed", str(task.seed), "--json"]
    if task.plots:
        command += ["--plots", task.plots]
    if not task.is_timed:
        command += ["--any-speed"]
    environment = dict(os.environ)  # noqa: TID251 - what a child inherits
    if task.hash_seed:
        environment["PYTHONHASHSEED"] = task.hash_seed
    limit_s = 60 + WALL_S_PER_CORE_S * task.real_s_max
    name = Path(task.file).stem
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Outcome.of_dead_process(name, task.file, task.seed, f"the process didn't end within {limit_s:.0f} s")
    try:
        return Outcome.from_json(done.stdout.splitlines()[-1])
    except (IndexError, ValueError, TypeError, KeyError):
        said = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
        return Outcome.of_dead_process(name, task.file, task.seed, f"the process ended with {done.returncode}:\n{said}")


def run_all(
    tasks: Sequence[Task], jobs: int, on_change: OnChange, on_done: OnDone, run: Run = run_process
) -> list[Outcome]:
    """Every task: first those that want the machine to themselves, one at a time, then the others, ``jobs`` at a time.

    Gives the outcomes in the order of the tasks. ``on_change`` hears now and then what is done and what runs, ``on_done`` of each task
    that ended.
    """
    outcomes: dict[int, Outcome] = {}
    alone = [index for index, task in enumerate(tasks) if task.is_alone]
    beside = [index for index, task in enumerate(tasks) if not task.is_alone]
    for indices, at_once in ((alone, 1), (beside, max(1, jobs))):
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            try:
                futures = {pool.submit(run, tasks[index]): index for index in indices}
                _wait_for(futures, tasks, outcomes, on_change, on_done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [outcomes[index] for index in range(len(tasks))]


def _wait_for(
    futures: Mapping[Future[Outcome], int],
    tasks: Sequence[Task],
    outcomes: dict[int, Outcome],
    on_change: OnChange,
    on_done: OnDone,
) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=LOOK_S, return_when=FIRST_COMPLETED)
        for index, outcome in sorted(((futures[one], one.result()) for one in done), key=lambda pair: pair[0]):
            outcomes[index] = outcome
            on_done(tasks[index], outcome)
        running = [tasks[futures[one]] for one in futures if one in left and one.running()]
        on_change([tasks[index] for index in outcomes], running)
