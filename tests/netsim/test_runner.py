"""What a run says of itself, and everything that it fails by. Small scenarios with workloads of this file's own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from netsim import runner as runner_module
from netsim.metrics import Metrics
from netsim.outcome import Outcome
from netsim.runner import prepare, run_seed
from netsim.workloads import smoke
from netsim.world import World

SCENARIO = """
about = "Three hosts."
duration_s = 30
workload = "smoke.{workload}"
{more}
[hosts.home]
count = 3
kind = "echo"
[checks]
asked = {{ min = {asked_min} }}
"""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Nothing to be told."""


class Quiet:
    """Asks nothing; the others do one thing wrong each."""

    SETTINGS: ClassVar[type[Any]] = NoSettings
    METRICS: ClassVar[Mapping[str, str]] = {"asked": "questions", "answer_s": "seconds", "family.*": "many"}

    def __init__(self, world: World, settings: NoSettings, metrics: Metrics) -> None:
        self.world = world
        self.metrics = metrics

    async def run(self) -> None:
        await asyncio.sleep(1)
        self.metrics.count("asked", 5, of="home-2")
        self.metrics.observe("family.one", 1.0)


class Raising(Quiet):
    async def run(self) -> None:
        raise RuntimeError("the workload is broken")


class Logging(Quiet):
    async def on_host(self) -> None:
        logging.getLogger("peerd.somewhere").error("the sky falls on %s", "us")

    async def run(self) -> None:
        await asyncio.sleep(1)
        await self.world.on(self.world.machines["home-1"], self.on_host())
        await super().run()


class Cloudy(Quiet):
    async def run(self) -> None:
        logging.getLogger("peerd.somewhere").warning("clouds")
        await super().run()


class Forgetful(Quiet):
    """A task dies and nobody asks."""

    async def run(self) -> None:
        async def die() -> None:
            raise RuntimeError("unheard")

        asyncio.get_running_loop().create_task(die(), name="unheard")
        await super().run()


class Endless(Quiet):
    async def run(self) -> None:
        await super().run()
        await asyncio.sleep(1e6)


class Stuck(Quiet):
    """Time never moves again."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)


class Owing(Quiet):
    """Two of three never give what they owe."""

    async def run(self) -> None:
        self.metrics.owed_by("asked", [*self.world.machines, "the world at large"])
        self.metrics.gave("asked", "home-2")
        await asyncio.sleep(1e6)


class Blameless(Quiet):
    async def run(self) -> None:
        await asyncio.sleep(1)
        self.metrics.count("asked", 5)
        self.world.kill(self.world.machines["home-2"])
        self.world.partition(["home-1"], ["home-3"])


class Undeclared(Quiet):
    async def run(self) -> None:
        await super().run()
        self.metrics.count("askd")


class Interrupted(Quiet):
    directories: ClassVar[list[Path]] = []

    async def run(self) -> None:
        (self.world.directory / "file").write_text("of a node")
        self.directories.append(self.world.directory)
        raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def one(workload: type[Quiet], more: str = "", asked_min: int = 5, seed: int = 1, **options: Any) -> Outcome:
        monkeypatch.setitem(smoke.WORKLOADS, workload.__name__.lower(), workload)  # type: ignore[misc]
        file = tmp_path / "small.toml"
        file.write_text(SCENARIO.format(workload=workload.__name__.lower(), more=more, asked_min=asked_min))
        return run_seed(prepare(file), seed, **options)

    return one


def test_a_run_that_holds_says_what_it_measured(run: Any) -> None:
    outcome = run(Quiet)
    assert outcome.passed
    assert outcome.failures == ()
    assert outcome.numbers["asked"] == 5
    assert outcome.numbers["family.one.p50"] == 1.0
    assert (outcome.virtual_s, outcome.scenario, outcome.seed) == (1.0, "small", 1)
    assert outcome.trace_lines >= 3
    assert outcome.replay.endswith("small.toml --seed 1")


def test_the_same_seed_has_the_same_hash_and_numbers_another_seed_another_hash(run: Any) -> None:
    first, again, other = run(Quiet, seed=1), run(Quiet, seed=1), run(smoke.Echo, "endless = true", asked_min=1, seed=2)
    assert first.trace_hash == again.trace_hash
    assert (first.numbers, first.events) == (again.numbers, again.events)
    assert other.trace_hash != run(smoke.Echo, "endless = true", asked_min=1, seed=3).trace_hash


def test_whether_somebody_watches_changes_nothing(run: Any) -> None:
    shares: list[float] = []
    lines: list[str] = []
    watched = run(Cloudy, on_progress=lambda share, events: shares.append(share), on_line=lines.append)
    assert watched.trace_hash == run(Cloudy).trace_hash
    assert shares
    assert any("clouds" in line for line in lines)


def test_a_broken_bound_fails_and_tells_the_story_of_its_culprit(run: Any) -> None:
    outcome = run(Quiet, asked_min=6)
    assert not outcome.passed
    (check,) = outcome.checks
    assert (check.value, check.bound, check.holds, check.culprits) == (5, ">= 6", False, ("home-2",))
    assert any("start 1" in line for line in outcome.stories["home-2"])
    assert "" not in outcome.stories


def test_a_number_that_never_came_tells_the_stories_of_those_who_owe_it(run: Any) -> None:
    outcome = run(Owing)
    (check,) = outcome.checks
    assert (check.value, check.culprits) == (None, ("home-1", "home-3", "the world at large"))
    assert list(outcome.stories) == ["home-1", "home-3", ""], "the time that was over is nobody's"
    assert any("FAILED" in line and "wasn't done" in line for line in outcome.stories[""])


def test_a_number_that_blames_nobody_tells_what_befell_the_run_last(run: Any) -> None:
    outcome = run(Blameless, asked_min=6)
    assert list(outcome.stories) == [""]
    assert [line.split()[1:] for line in outcome.stories[""]][-2:] == [
        ["fault", "home-2", "kill"],
        ["fault", "partition", "1", "1", "1", "both", "ways"],
    ]


@pytest.mark.parametrize(
    ("workload", "more", "said"),
    [
        (Raising, "", "the workload is broken"),
        (Logging, "", "home-1: ERROR peerd.somewhere: the sky falls on us"),
        (Forgetful, "", "unheard"),
        (Endless, "", "the workload wasn't done after 30 virtual seconds"),
        (Undeclared, "", "the workload measures what its METRICS don't name: askd"),
        (Quiet, "real_s_max = 0.000001", "took "),
        (Quiet, "rss_mib_max = 1.0", "it was given 1"),
    ],
)
def test_a_run_fails_by(run: Any, workload: type[Quiet], more: str, said: str) -> None:
    outcome = run(workload, more)
    assert not outcome.passed
    assert any(said in failure for failure in outcome.failures)


def test_a_run_in_which_time_stands_still_ends_and_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netsim.loop.TURNS_PER_MOMENT_MAX", 20)
    outcome = run(Stuck)
    assert any("TimeStandsStill" in failure for failure in outcome.failures)
    assert outcome.trace_hash


def test_a_run_that_takes_far_too_long_is_given_up(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "REAL_S_GIVEN_UP", 0.0)
    outcome = run(Endless, "endless = true")
    assert any("given up" in failure for failure in outcome.failures)
    assert outcome.virtual_s < 1


def test_what_the_scenario_expects_or_does_not_time_is_no_failure(run: Any) -> None:
    assert run(Logging, 'expected_errors = ["the sky falls"]').passed
    assert run(Endless, "endless = true").passed
    assert run(Quiet, "real_s_max = 0.000001", is_timed=False).passed


def test_a_run_that_has_the_machine_to_itself_is_held_to_the_clock_from_the_start_of_its_process(run: Any) -> None:
    long_ago = time.perf_counter() - 1000
    (failure,) = run(Quiet, "alone = true\nreal_s_max = 900", began_s=long_ago).failures
    assert failure.startswith("took 0.") and " s of a core, 1000." in failure
    assert failure.endswith(" s by the clock; it was given 900")
    assert run(Quiet, "alone = true\nreal_s_max = 900", began_s=long_ago, is_timed=False).passed
    assert run(Quiet, "alone = true\nreal_s_max = 1100", began_s=long_ago).passed
    assert run(Quiet, "alone = true\nreal_s_max = 900").passed, "without a beginning the clock starts with the run"
    beside_others = run(Quiet, "real_s_max = 900", began_s=long_ago)
    assert beside_others.passed
    assert beside_others.wall_s > 1000 > beside_others.real_s


def test_a_run_alone_that_takes_far_too_long_by_the_clock_is_given_up(run: Any) -> None:
    outcome = run(Endless, "endless = true\nalone = true\nreal_s_max = 300", began_s=time.perf_counter() - 1000)
    assert any("given up after 1000 s" in failure for failure in outcome.failures)


def test_warnings_are_told_in_the_story_of_their_host_and_fail_nothing(run: Any) -> None:
    assert run(Cloudy).passed


def test_an_outcome_survives_its_way_between_processes(run: Any) -> None:
    outcome = run(Quiet, asked_min=6)
    received = Outcome.from_json(outcome.to_json())
    assert received.checks == outcome.checks
    assert received.stories == outcome.stories
    assert (received.real_s, received.wall_s) == (outcome.real_s, outcome.wall_s)
    assert (received.trace_hash, received.numbers, received.passed) == (outcome.trace_hash, outcome.numbers, False)


def test_files_of_a_run_are_gone_even_if_somebody_interrupts_it(run: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted)
    assert [directory.exists() for directory in Interrupted.directories] == [False]
