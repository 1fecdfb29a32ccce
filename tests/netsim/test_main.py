"""The command line, in processes as people start it; two of them are compared for the same seed."""

from __future__ import annotations

import errno
import io
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from netsim import __main__ as program
from netsim import campaign
from netsim.__main__ import main
from netsim.outcome import Outcome
from netsim.processes import Task

ROOT = Path(__file__).parents[2]
SMALL = """
about = "Ten hosts come, go, freeze and crash while they ask each other."
duration_s = 20
endless = true
workload = "smoke.echo"
[settings]
asks_per_s = 30.0
[hosts.home]
count = 10
kind = "echo"
start_s = [0.0, 1.0]
[links]
rtt_ms = [10.0, 200.0]
loss = 0.01
uplink_mbit = [5.0, 20.0]
[churn]
groups = ["home"]
leaves_per_hour = 200.0
clean = 0.2
crash = 0.2
vanish = 0.2
freeze = 0.2
sleep = 0.2
back_after_s = [0.5, 3.0]
[checks]
asked = {{ min = {asked_min} }}
wrong = {{ max = 0 }}
"""
NODES = """
about = "Two servers share the blocks of a model, and a driver gets a text while one of the others comes and goes."
duration_s = 120
real_s_max = 60
workload = "sessions.texts"
[settings]
texts = 1
[hosts.boot]
count = 1
kind = "node"
[hosts.boot.settings]
serve = "none"
[hosts.server]
count = 2
kind = "node"
start_s = [1.0, 1.0]
[hosts.server.settings]
join = ["boot"]
max_blocks = 6
[hosts.driver]
count = 1
kind = "node"
start_s = [1.0, 1.0]
[hosts.driver.settings]
join = ["boot"]
serve = "none"
[links]
rtt_ms = [20.0, 120.0]
loss = 0.01
[[faults]]
at_s = 5.0
kind = "freeze"
hosts = "boot"
for_s = 5.0
[checks]
"texts.done" = { min = 1.0 }
"texts.wrong" = { max = 0.0 }
"""


def netsim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "netsim", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def small(directory: Path, asked_min: int = 100) -> str:
    file = directory / "small.toml"
    file.write_text(SMALL.format(asked_min=asked_min))
    return str(file)


def test_daemons_have_the_same_hash_in_two_processes_with_two_hash_seeds(tmp_path: Path) -> None:
    (tmp_path / "nodes.toml").write_text(NODES)
    table = tmp_path / "made" / "table.md"
    done = netsim("all", str(tmp_path), "--repeat", "nodes", "--seeds", "3:3", "--table", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each of 1 runs was the same in two processes with two PYTHONHASHSEEDs" in done.stdout
    assert "2 runs, 0 failed" in done.stdout
    rows = [line.split(" | `")[0] for line in table.read_text().splitlines()[2:]]
    assert rows == ["| nodes | 1 | 1", "| nodes, the same twice | 1 | 1"]
    told = done.stderr.splitlines()
    assert len(told) == 3, "each run says that it ended, and no bar is drawn into a pipe"
    assert all(line.startswith("ok ") for line in told)


def test_a_failed_check_exits_1_with_the_story_and_the_command_and_ends_with_the_hash(tmp_path: Path) -> None:
    file = small(tmp_path, asked_min=100_000)
    done = netsim("run", file, "--seed", "7")
    assert done.returncode == 1
    assert f"again: python -m netsim run {file} --seed 7" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("trace hash: ")


def test_a_run_that_holds_exits_0_and_a_file_gets_all_of_it_up_to_the_hash(tmp_path: Path) -> None:
    file, told = small(tmp_path), tmp_path / "told"
    with told.open("w") as out:
        command = [sys.executable, "-m", "netsim", "run", file]
        done = subprocess.run(
            command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    text = told.read_text()
    assert re.fullmatch(r"trace hash: [0-9a-f]{32}", text.splitlines()[-1])
    assert re.search(r"in [0-9.]+ s of one core, [0-9.]+ s by the clock", text)


@pytest.mark.parametrize(
    ("raises", "code", "ends", "said"),
    [
        (None, 0, 0, ""),
        (None, 2, 2, ""),
        (BrokenPipeError(), 0, 1, ""),
        (BrokenPipeError(), 2, 2, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 0, 1, "can't be written (No space left on device)"),
    ],
)
def test_what_cannot_be_flushed_at_the_end_is_no_success(
    raises: OSError | None, code: int, ends: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Out(io.StringIO):
        def flush(self) -> None:
            if raises is not None:
                raise raises

    def end(status: int) -> None:
        raise SystemExit(status)

    errors = io.StringIO()
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "stderr", errors)
    for out in (Out(), None) if raises is None else (Out(),):  # None: the shell closed it
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as ended:
            program._end(code)
        assert ended.value.code == ends
    assert said in errors.getvalue()
    assert bool(errors.getvalue()) == bool(said)


def test_help_exits_0_and_an_interruption_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["all", "--help"])
    assert ended.value.code == 0
    assert "--within S" in capsys.readouterr().out

    def interrupted(_: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_list", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "netsim: interrupted\n"


def ran_at_once(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Every run of a campaign holds, and takes no time; what was to be run."""
    made: list[Task] = []

    def run_none(tasks: Sequence[Task], *_: object) -> list[Outcome]:
        made.extend(tasks)
        return [
            Outcome(Path(one.file).stem, one.file, one.seed, {}, (), (), {}, "aa", 1, 1, 1.0, 1.0, 1.0) for one in tasks
        ]

    monkeypatch.setattr(campaign, "run_all", run_none)
    return made


@pytest.mark.parametrize(
    ("within", "ago_s", "code", "last"),
    [
        ("3600", 3000, 0, "1 runs, 0 failed, in 50 min"),
        ("3600", 3700, 1, "TOO SLOW: it took 3,700 s by the clock, and --within gave it 3,600"),
        ("", 3700, 0, "1 runs, 0 failed, in 62 min"),
    ],
)
def test_a_campaign_that_takes_longer_than_it_was_given_fails(
    within: str,
    ago_s: int,
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran_at_once(monkeypatch)
    small(tmp_path)
    bound = ["--within", within] if within else []
    assert main(["all", str(tmp_path), *bound], began_s=time.perf_counter() - ago_s) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_process_counts_from_what_the_clock_said_before_anything_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran_at_once(monkeypatch)
    small(tmp_path)
    clock = time.perf_counter
    readings = iter([clock() - 5000])  # the first; then the clock goes right

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(time, "perf_counter", lambda: next(readings, None) or clock())
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["netsim", "all", str(tmp_path), "--within", "4000"])
    monkeypatch.delitem(sys.modules, "netsim.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("netsim", run_name="__main__")
    assert ended.value.code == 1
    assert re.search("TOO SLOW: it took 5,[0-9]{3} s by the clock", capsys.readouterr().out)


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_run_alone_is_held_to_the_clock_from_the_start_of_its_process(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "alone.toml"
    file.write_text(
        SMALL.format(asked_min=1).replace("duration_s = 20", "duration_s = 2\nalone = true\nreal_s_max = 900")
    )
    assert main(["run", str(file), *how], began_s=time.perf_counter() - 1000) == 1
    assert re.search(r"took [0-9.]+ s of a core, 100[0-9.]+ s by the clock; it was given 900", capsys.readouterr().out)
    assert main(["run", str(file), *how]) == 0


def test_several_scenarios_may_be_run_twice_in_one_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ran_at_once(monkeypatch)
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.toml").write_text(SMALL.format(asked_min=100))
    table = tmp_path / "table.md"
    again = ["--repeat", "one", "--repeat", "three", "--repeat", "one", "--seeds", "4:5", "--table", str(table)]
    assert main(["all", str(tmp_path), *again]) == 0
    pairs = [(name, seed, hash_seed) for name in ("one", "three") for seed in (4, 5) for hash_seed in ("1", "2")]
    once = [(name, 1, "") for name in ("one", "three", "two")]
    assert sorted((Path(task.file).stem, task.seed, task.hash_seed) for task in made) == sorted(once + pairs)
    runs = "each of 2 runs was the same in two processes with two PYTHONHASHSEEDs"
    assert capsys.readouterr().out.splitlines()[-3:-1] == [f"one: {runs}", f"three: {runs}"]
    rows = [line.split(" |")[0] for line in table.read_text().splitlines()[2:]]
    assert rows == ["| one", "| three", "| two", "| one, the same twice", "| three, the same twice"]

    assert main(["all", str(tmp_path), "--repeat", "one", "--repeat", "four"]) == 2
    assert capsys.readouterr().err == f"netsim: --repeat: there is no four in {tmp_path}\n"


def test_a_scenario_that_makes_no_sense_exits_2_with_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    file.write_text("about = 3")
    done = netsim("run", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"netsim: {file}: about: has to be a text, not 3\n"


def test_the_list_names_every_scenario_of_the_tree() -> None:
    done = netsim("list")
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "scenarios").glob("*.toml"):
        assert f"\n{file.stem} " in done.stdout


def test_what_cannot_be_run_or_written_is_said_in_a_sentence_before_anything_runs(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for arguments, said in (
        (("all", str(nothing)), f"there are no scenarios in {nothing}"),
        (("list", str(nothing / "none")), f"there are no scenarios in {nothing / 'none'}"),
        (("run", small(tmp_path), "--table", str(nothing)), f"--table: {nothing} can't be written (Is a directory)"),
    ):
        done = netsim(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"netsim: {said}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: command; see python -m netsim --help"),
        ("fly", "command: invalid choice: 'fly'"),
        ("run", "the following arguments are required: FILE; see python -m netsim run --help"),
        ("run smoke --sead 1", "unrecognized arguments: --sead 1"),
        ("run smoke --seed -1", "--seed: -1 is less than 0"),
        ("run smoke --seed one", "--seed: 'one' is no whole number"),
        ("run smoke --seeds 5:2", "--seeds: '5:2' goes backwards: write 2:5"),
        ("run smoke --seeds=-5:2", "--seeds: -5 is less than 0"),
        ("run smoke --seeds 1:x", "--seeds: 'x' is no whole number"),
        ("run smoke --seeds 0:10000", "--seeds: '0:10000' are 10,001 seeds; 10,000 can be run at once"),
        ("run smoke --seeds", "--seeds: expected one argument"),
        ("all --jobs 0", "--jobs: 0 is less than 1"),
        ("all --within 0", "--within: 0 is less than 1"),
    ],
)
def test_arguments_that_make_no_sense_exit_2_with_one_sentence(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"netsim: {said}")
    assert told.err.count("\n") == 1
