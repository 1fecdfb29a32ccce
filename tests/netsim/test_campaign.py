from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from netsim import campaign
from netsim.campaign import Part, campaign_lines, hash_of, twice_lines
from netsim.outcome import Outcome
from netsim.processes import Task
from netsim.runner import prepare

SMALL = """
about = "Two hosts."
duration_s = 2
endless = true
workload = "smoke.echo"
[hosts.home]
count = 2
kind = "echo"
[checks]
asked = { min = 1 }
"""


def parts(directory: Path, **told: bool) -> list[Part]:
    found = []
    for name, is_twice in told.items():
        file = directory / f"{name}.toml"
        file.write_text(SMALL)
        found.append(Part(prepare(file), (1,), is_twice))
    return found


def ran(trace_hash: str) -> Outcome:
    return Outcome("one", "one.toml", 1, {}, (), (), {}, trace_hash, 1, 1, 1.0, 1.0, 1.0)


def test_parts_are_told_in_one_table_and_have_one_hash(tmp_path: Path) -> None:
    one, two = parts(tmp_path, one=False, two=True)
    results = [campaign._result(one, {1: [ran("aa")]}), campaign._result(two, {1: [ran("bb"), ran("bb")]})]
    first, second = campaign_lines(results)[2:]
    assert first.startswith("one")
    assert first.endswith("ok")
    assert second.endswith("the same twice")
    assert twice_lines(results) == ["each of 1 runs was the same in two processes with two PYTHONHASHSEEDs"]
    assert [result.remark for result in results] == ["", "the same twice"]
    assert hash_of(results[:1]) == "aa"
    assert len(hash_of(results)) == 32


def test_a_run_that_differs_is_a_failure_with_both_hashes(tmp_path: Path) -> None:
    (part,) = parts(tmp_path, one=True)

    different = campaign._result(part, {1: [ran("aa"), ran("bb")]})
    assert not different.passed
    assert twice_lines([different])[0] == "NOT THE SAME TWICE: one, seed 1: aa and bb"
    assert different.remark == "NOT THE SAME TWICE"
    assert campaign_lines([different])[2].endswith("FAILED")
    assert campaign._result(part, {1: [ran("aa"), ran("aa")]}).passed
    assert not campaign._result(part, {1: [ran(""), ran("")]}).passed


def test_of_several_parts_that_were_run_twice_each_is_told_and_one_that_differs_hides_no_other(tmp_path: Path) -> None:
    one, two, three = parts(tmp_path, one=True, two=False, three=True)
    same = {1: [ran("aa"), ran("aa")]}
    results = [campaign._result(part, same) for part in (one, two, three)]
    runs = "each of 1 runs was the same in two processes with two PYTHONHASHSEEDs"
    assert twice_lines(results) == [f"one: {runs}", f"three: {runs}"]
    results[0] = campaign._result(one, {1: [ran("aa"), ran("bb")]})
    assert twice_lines(results)[0].startswith("NOT THE SAME TWICE: one, seed 1")
    assert twice_lines(results)[-1] == f"three: {runs}"


def test_a_scenario_that_is_to_run_alone_says_so_of_each_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = parts(tmp_path, one=False)
    (tmp_path / "two.toml").write_text(SMALL.replace("endless", "alone = true\nendless"))
    two = Part(prepare(tmp_path / "two.toml"), (1,), True)
    made: list[Task] = []

    def run_none(tasks: Sequence[Task], *_: object) -> list[Outcome]:
        made.extend(tasks)
        return [ran("aa") for _ in tasks]

    monkeypatch.setattr(campaign, "run_all", run_none)
    assert all(result.passed for result in campaign.run_parts([one, two], 2))
    assert sorted((Path(task.file).stem, task.is_alone) for task in made) == [
        ("one", False),
        ("two", True),
        ("two", True),
    ]
