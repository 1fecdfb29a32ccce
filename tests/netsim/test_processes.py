"""Which runs share the machine. What a run says to its parent is in test_main.py, with real processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from netsim.outcome import Outcome
from netsim.processes import Task, run_all

MEET_S = 20.0
OVERLAP_S = 0.1
"""So long a run that is to be alone looks for others."""


def ended(task: Task) -> Outcome:
    return Outcome.of_dead_process(task.file, task.file, task.seed, "")


def task(name: str, *, is_alone: bool = False) -> Task:
    return Task(name, 1, 60.0, is_alone=is_alone)


def silent(*_: object) -> None:
    """Hears of a task."""


class Machine:
    """Keeps who ran beside whom."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.beside: dict[str, tuple[str, ...]] = {}
        self._running: list[str] = []
        self._both = threading.Barrier(2, timeout=MEET_S)
        self._news = threading.Condition()

    def run(self, task: Task) -> Outcome:
        with self._news:
            self.started.append(task.file)
            self._running.append(task.file)
            self._news.notify_all()
            if task.is_alone:
                self._news.wait_for(lambda: len(self._running) > 1, OVERLAP_S)
        if not task.is_alone:
            self._both.wait()  # neither goes on before the other has begun
        with self._news:
            self.beside[task.file] = tuple(name for name in self._running if name != task.file)
        if not task.is_alone:
            self._both.wait()
        with self._news:
            self._running.remove(task.file)
        return ended(task)


def test_runs_that_want_the_machine_to_themselves_come_first_one_at_a_time_and_the_others_side_by_side() -> None:
    machine = Machine()
    tasks = [task("one"), task("first", is_alone=True), task("two"), task("second", is_alone=True)]
    done: list[str] = []
    outcomes = run_all(tasks, 3, silent, lambda task, outcome: done.append(task.file), machine.run)
    assert machine.started[:2] == done[:2] == ["first", "second"]
    assert machine.beside == {"first": (), "second": (), "one": ("two",), "two": ("one",)}
    assert [outcome.scenario for outcome in outcomes] == ["one", "first", "two", "second"]


def test_what_is_done_and_what_runs_is_told_of_all_of_them() -> None:
    told: list[int] = []

    def on_change(done: Sequence[Task], running: Sequence[Task]) -> None:
        told.append(len(done))

    run_all([task("one"), task("two", is_alone=True)], 1, on_change, silent, ended)
    assert (told[0], told[-1]) == (1, 2)


def test_a_run_that_raises_ends_the_others_before_they_begin() -> None:
    started: list[str] = []

    def fail(task: Task) -> Outcome:
        started.append(task.file)
        raise RuntimeError("no more processes")

    with pytest.raises(RuntimeError, match="no more processes"):
        run_all([task("one"), task("two", is_alone=True)], 1, silent, silent, fail)
    assert started == ["two"]
