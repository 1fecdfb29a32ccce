from __future__ import annotations

import dataclasses
import io

import pytest

from netsim.outcome import Checked, Outcome
from netsim.report import (
    Progress,
    duration_said,
    failure_lines,
    markdown_table,
    run_lines,
    said,
    seeds_lines,
    table,
)


def outcome(seed: int, value: float, *, holds: bool = True, failures: tuple[str, ...] = ()) -> Outcome:
    check = Checked("lookup_s.p50", "<= 2", value, holds, () if holds else ("home-3",))
    stories = {} if holds else {"home-3": ("    1.000000  fault home-3 kill",)}
    numbers = {"lookup_s.p50": value, "found": 12.0}
    file = "scenarios/dht.toml"
    ran = Outcome("dht", file, seed, numbers, (check,), failures, stories, "ab", 5, 9, 60.0, 2.0, 100.0)
    return dataclasses.replace(ran, wall_s=2.5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (12345.0, "12,345"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (None, "never measured"),
    ],
)
def test_numbers_are_said_as_people_read_them(value: float | None, expected: str) -> None:
    assert said(value) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(5.04, "5.0 s"), (600.0, "10 min"), (7200.0, "2.0 h")])
def test_durations_are_said_as_people_say_them(seconds: float, expected: str) -> None:
    assert duration_said(seconds) == expected


def test_columns_are_aligned_and_nothing_trails() -> None:
    assert table([("a", "value"), ("bcd", "1")], right=(1,)) == ["  a    value", "  ---  -----", "  bcd      1"]


def test_one_run_tells_its_checks_what_else_was_measured_and_no_failure() -> None:
    text = "\n".join(run_lines(outcome(1, 1.5), "Lookups are quick."))
    assert "60.0 s of virtual time in 2.0 s of one core, 2.5 s by the clock (30 times as fast)" in text
    assert "lookup_s.p50   1.50  <= 2   ok" in text
    assert "found            12" in text
    assert "FAILED" not in text


def test_a_failure_tells_why_whose_story_and_how_to_run_it_again() -> None:
    text = "\n".join(failure_lines(outcome(7, 3.0, holds=False, failures=("home-3: Traceback\n  boom",))))
    assert "lookup_s.p50 is 3, wanted <= 2 (of home-3)" in text
    assert "      boom" in text
    assert "the story of home-3, its last 1 lines:\n          1.000000  fault home-3 kill" in text
    assert text.endswith("again: python -m netsim run scenarios/dht.toml --seed 7")


def test_a_failure_names_a_few_of_many_culprits_and_what_the_run_did_last_where_nobody_is_known() -> None:
    check = Checked("joined", ">= 9", 1.0, False, tuple(f"home-{number}" for number in range(1, 10)))
    stories = {"": ("    2.000000  fault home-7 kill",)}
    failed = dataclasses.replace(outcome(7, 1.0), checks=(check,), stories=stories)
    text = "\n".join(failure_lines(failed))
    assert "joined is 1, wanted >= 9 (of home-1, home-2, home-3, home-4, home-5, home-6 and 3 more)" in text
    never = dataclasses.replace(check, value=None, culprits=())
    assert "    joined was never measured, wanted >= 9\n" in "\n".join(
        failure_lines(dataclasses.replace(failed, checks=(never,)))
    )
    assert "    what happened last in the run:\n          2.000000  fault home-7 kill" in text


def test_many_seeds_are_one_table_of_lowest_median_highest_with_those_that_failed() -> None:
    outcomes = [outcome(seed, seed / 2, holds=seed < 5) for seed in range(1, 6)]
    text = "\n".join(seeds_lines(outcomes, "Lookups are quick."))
    assert "5 seeds (1-5), 4 passed" in text
    assert "0.500    1.50     2.50  FAILED for 1: 5" in text
    assert "again: python -m netsim run scenarios/dht.toml --seed 5" in text


def test_a_process_that_died_is_a_failure_in_the_table_too() -> None:
    dead = Outcome.of_dead_process("dht", "scenarios/dht.toml", 2, "the process ended with -9:\n")
    text = "\n".join(seeds_lines([dead, outcome(1, 1.0)], "x"))
    assert "1 passed" in text
    assert "the process ended with -9" in text
    assert "lookup_s.p50" in text


def test_the_documents_table_has_a_row_for_each_scenario() -> None:
    dead = Outcome.of_dead_process("x", "x.toml", 1, "dead")
    lines = markdown_table([("the same twice", [outcome(1, 0.5), outcome(2, 1.5)]), ("", [dead])])
    assert lines[2] == "| dht, the same twice | 2 | 2 | `lookup_s.p50` 0.500 to 1.50 (<= 2) | 2.0 | 2.5 | 100 |"
    assert lines[3] == "| x | 1 | 0 |  | 0.0 | 0.0 | 0 |"
    assert {line.count("|") for line in lines} == {8}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_redraws_in_place_on_a_terminal_and_is_silent_in_a_file() -> None:
    screen, file = Screen(), io.StringIO()
    for stream in (screen, file):
        progress = Progress(stream, "dht")
        progress.show(0.5, "a long note")
        progress.show(1.0)
        progress.clear()
    assert file.getvalue() == ""
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().count("\r") == 4
    assert " 50%" in screen.getvalue()
    assert screen.getvalue().endswith(" \r")
