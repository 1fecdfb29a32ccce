"""What passes between processes, and what a failed run is known by."""

from __future__ import annotations

import dataclasses
import json

import pytest

from netsim.metrics import Series
from netsim.outcome import Checked, Outcome

CHECKED = Checked("found.share", ">= 1", 0.5, False, ("home-3", "home-4"))
HELD = Checked("wrong", "<= 0", 0.0, True)
NEVER = Checked("asked", ">= 1", None, False)


def ran(*checks: Checked, failures: tuple[str, ...] = ()) -> Outcome:
    stories = {"home-3": ("1.0 fault home-3 kill",), "": ("2.0 the end",)}
    done = Outcome(
        "dht", "my scenarios/dht.toml", 7, {"wrong": 0.0}, checks, failures, stories, "ab", 5, 9, 60.0, 2.0, 80.0
    )
    return dataclasses.replace(done, wall_s=2.5, series={"found": Series((1.0,), (2.0,))}, observations={"x": (1.0,)})


def test_a_run_passes_when_every_check_holds_and_nothing_failed() -> None:
    assert ran(HELD).passed
    assert not ran(HELD, CHECKED).passed
    assert not ran(NEVER).passed
    assert not ran(HELD, failures=("home-1: ERROR",)).passed
    assert not Outcome.of_dead_process("dht", "dht.toml", 7, "the process ended with -9").passed


def test_all_but_what_is_drawn_comes_back_from_its_line_of_json() -> None:
    told = ran(HELD, CHECKED, NEVER, failures=("one", "two"))
    line = told.to_json()
    assert "\n" not in line
    assert Outcome.from_json(line) == dataclasses.replace(told, series={}, observations={})


def test_of_a_run_that_read_no_clock_there_is_none() -> None:
    told = json.loads(ran(HELD).to_json())
    del told["wall_s"]
    assert Outcome.from_json(json.dumps(told)).wall_s == 0.0


@pytest.mark.parametrize(
    "line", ["", "drew x.png", "[]", "3", "{}", '{"checks": 3}', '{"checks": [{}], "failures": []}']
)
def test_what_is_no_outcome_is_one_of_three_errors(line: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Outcome.from_json(line)


def test_the_command_that_replays_it_survives_a_shell() -> None:
    assert ran().replay == "python -m netsim run 'my scenarios/dht.toml' --seed 7"
