"""``python -m netsim``: list scenarios, run them, measure the simulator's own speed.

Exit codes: 0 when everything held, 1 when a check failed, 2 for a scenario or an argument that makes no sense.
"""

from __future__ import annotations

# ruff: noqa: E402 - the clock is read before anything else is imported
import time

BEGAN_S = time.perf_counter() - time.process_time()
"""When this process began, or hardly later: what follows takes a while to import."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from netsim.campaign import Part, campaign_lines, hash_of, run_parts, twice_lines
from netsim.outcome import Outcome
from netsim.report import Progress, duration_said, failure_lines, markdown_table, run_lines, seeds_lines, table
from netsim.runner import Prepared, prepare, run_seed
from netsim.scenario import ScenarioError, load_scenario

SCENARIOS = Path("scenarios")
SEEDS_AT_MOST = 10_000
ABOUT_CHARACTERS = 90


def main(arguments: Sequence[str] | None = None, *, is_process: bool = False, began_s: float | None = None) -> int:
    """Run a command; returns the exit code.

    With ``is_process`` the process ends with it, and need not be tidy. ``began_s`` is when what it takes by the clock began, as
    `time.perf_counter` said it then; without it, now.
    """
    try:
        given = _parser().parse_args(arguments)
        given.is_process = is_process
        given.began_s = time.perf_counter() if began_s is None else began_s
        if given.command == "list":
            return _list(Path(given.directory))
        if given.command == "bench":
            from netsim.bench import main as bench

            return bench()
        return _all(given) if given.command == "all" else _run(given)
    except (ScenarioError, _Misused) as error:
        print(f"netsim: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("netsim: interrupted", file=sys.stderr)
        return 130


class _Misused(Exception):
    """Arguments that make no sense."""


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise _Misused(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m netsim", description="The production code in virtual time.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="what scenarios there are")
    listing.add_argument("directory", nargs="?", default=str(SCENARIOS))
    commands.add_parser("bench", help="how fast the simulator is: fabric events and RPCs per second")
    every = commands.add_parser("all", help="run every scenario once, and some seeds of some twice to compare")
    every.add_argument("directory", nargs="?", default=str(SCENARIOS))
    every.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1, metavar="J", help="processes side by side")
    every.add_argument(
        "--repeat",
        action="append",
        default=[],
        metavar="NAME",
        help="a scenario whose seeds are run twice each; or several",
    )
    every.add_argument("--seeds", type=_seeds, default=range(1, 21), metavar="A:B", help="its seeds (default 1:20)")
    every.add_argument("--within", type=_seconds, default=None, metavar="S", help="fail if it all takes more seconds")
    every.add_argument("--table", default="", metavar="FILE", help="write a Markdown table of the results")
    run = commands.add_parser("run", help="run scenarios")
    run.add_argument("files", nargs="+", metavar="FILE", help="a scenario's file, or its name in scenarios/")
    run.add_argument("--seed", type=_seed, default=None, metavar="N", help="one seed (default 1)")
    run.add_argument("--seeds", type=_seeds, default=None, metavar="A:B", help="every seed from A to B")
    run.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1, metavar="J", help="processes side by side")
    run.add_argument("--plots", default="", metavar="DIR", help="draw PNGs into DIR (needs the extra `plots`)")
    run.add_argument("--twice", action="store_true", help="run each seed in two processes and compare the hashes")
    run.add_argument("--verbose", action="store_true", help="print every event and log line (one seed of one scenario)")
    run.add_argument("--table", default="", metavar="FILE", help="write a Markdown table of the results")
    run.add_argument("--any-speed", action="store_true", help="let it take as many real seconds as it likes")
    run.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    return parser


def _jobs(text: str) -> int:
    return _whole(text, least=1)


def _seconds(text: str) -> int:
    return _whole(text, least=1)


def _seed(text: str) -> int:
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return number


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    seeds = range(_seed(first), _seed(last or first) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} goes backwards: write {last}:{first}")
    if len(seeds) > SEEDS_AT_MOST:
        raise argparse.ArgumentTypeError(f"{text!r} are {len(seeds):,} seeds; {SEEDS_AT_MOST:,} can be run at once")
    return seeds


def _file(named: str) -> Path:
    path = Path(named)
    listed = SCENARIOS / f"{named}.toml"
    return listed if not path.exists() and listed.exists() else path


def _scenarios_in(directory: Path) -> list[Path]:
    files = sorted(file for file in directory.glob("*") if file.suffix in (".toml", ".py"))
    if not files:
        raise ScenarioError(f"there are no scenarios in {directory}")
    return files


def _list(directory: Path) -> int:
    files = _scenarios_in(directory)
    rows = [("scenario", "hosts", "virtual time", "about")]
    for file in files:
        scenario = load_scenario(file)
        about = " ".join(scenario.about.split())
        short = about if len(about) <= ABOUT_CHARACTERS else about[: ABOUT_CHARACTERS - 3].rstrip() + "..."
        rows.append((scenario.name, f"{scenario.host_count:,}", duration_said(scenario.duration_s), short))
    print("\n".join(table(rows, right=(1, 2), indent="")))
    return 0


def _run(given: argparse.Namespace) -> int:
    prepared = [prepare(_file(named)) for named in given.files]
    _make_room(given.table)
    seeds: Sequence[int] = given.seeds if given.seeds is not None else (1 if given.seed is None else given.seed,)
    if given.json:
        outcome = run_seed(
            prepared[0],
            seeds[0],
            is_timed=not given.any_speed,
            is_last=given.is_process,
            began_s=given.began_s,
        )
        _draw(prepared[0], outcome, given.plots)
        print(outcome.to_json())
        return 0 if outcome.passed else 1
    if len(prepared) == 1 and len(seeds) == 1 and not given.twice:
        return _run_here(prepared[0], seeds[0], given)
    return _run_many(prepared, seeds, given)


def _run_here(prepared: Prepared, seed: int, given: argparse.Namespace) -> int:
    progress = Progress(sys.stderr, f"{prepared.scenario.name} seed {seed}")
    began = time.perf_counter()

    def on_progress(share: float, events: int) -> None:
        took_s = time.perf_counter() - began
        left = f"{duration_said(took_s / share - took_s)} left, " if share > 0 else ""
        progress.show(share, f"{left}{events:,} callbacks")  # what is left comes first: it has to fit a line of 80

    on_line = print if given.verbose else None
    outcome = run_seed(
        prepared,
        seed,
        on_progress,
        on_line,
        is_timed=not given.any_speed,
        is_last=given.is_process,
        began_s=given.began_s,
    )
    progress.clear()
    _draw(prepared, outcome, given.plots)
    print("\n".join(run_lines(outcome, prepared.scenario.about)))
    _write_table([("", [outcome])], given.table)
    print(f"\ntrace hash: {outcome.trace_hash}")
    return 0 if outcome.passed else 1


def _run_many(prepared: Sequence[Prepared], seeds: Sequence[int], given: argparse.Namespace) -> int:
    """Every seed of every scenario in processes of their own, then one table for each scenario."""
    parts = [Part(one, tuple(seeds), given.twice) for one in prepared]
    results = run_parts(parts, given.jobs, given.plots, is_timed=not given.any_speed)
    for result in results:
        print("\n".join(seeds_lines(result.outcomes, result.part.prepared.scenario.about)), end="\n\n")
    print("\n".join(twice_lines(results)))
    _write_table([(result.remark, result.outcomes) for result in results], given.table)
    print(f"trace hash: {hash_of(results)}")
    return 0 if all(result.passed for result in results) else 1


def _all(given: argparse.Namespace) -> int:
    """Every scenario of a directory with one seed, and some seeds of some scenarios twice each; one table for all."""
    directory = Path(given.directory)
    files = _scenarios_in(directory)
    _make_room(given.table)
    prepared = [prepare(file) for file in files]
    parts = [Part(one, (1,), False) for one in prepared]
    by_name = {one.scenario.name: one for one in prepared}
    for name in dict.fromkeys(given.repeat):
        if name not in by_name:
            raise ScenarioError(f"--repeat: there is no {name} in {directory}")
        parts.append(Part(by_name[name], tuple(given.seeds), True))
    results = run_parts(parts, given.jobs)
    for result in results:
        for outcome in result.outcomes:
            if not outcome.passed:
                print("\n".join(failure_lines(outcome)), end="\n\n")
    print("\n".join(campaign_lines(results)))
    print("\n".join(["", *twice_lines(results)]))
    _write_table([(result.remark, result.outcomes) for result in results], given.table)
    outcomes = [outcome for result in results for outcome in result.outcomes]
    failed = sum(not outcome.passed for outcome in outcomes)
    took_s = time.perf_counter() - given.began_s
    print(f"{len(outcomes)} runs, {failed} failed, in {duration_said(took_s)}")
    is_within = given.within is None or took_s <= given.within
    if not is_within:
        print(f"TOO SLOW: it took {took_s:,.0f} s by the clock, and --within gave it {given.within:,}")
    return 0 if is_within and all(result.passed for result in results) else 1


def _draw(prepared: Prepared, outcome: Outcome, directory: str) -> None:
    if directory:
        from netsim.plots import draw

        for file in draw(outcome, prepared.workload.METRICS, Path(directory)):
            print(f"drew {file}", file=sys.stderr)


def _make_room(file: str) -> None:
    """For a table, before anything runs: hours later it would be too late to hear that it can't be written."""
    if not file:
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).open("a", encoding="utf-8").close()
    except OSError as error:
        raise ScenarioError(f"--table: {file} can't be written ({error.strerror})") from error


def _write_table(groups: Sequence[tuple[str, Sequence[Outcome]]], file: str) -> None:
    if file:
        Path(file).write_text("\n".join(markdown_table(groups)) + "\n", encoding="utf-8")


def _end(code: int) -> NoReturn:
    """At once: the interpreter would take a simulated network apart for seconds, object by object."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as where the shell closed it
                stream.flush()
        except BrokenPipeError:
            code = code or 1
        except OSError as error:  # a full disk: whoever reads the file later must not take it for all that was said
            print(f"netsim: what it said can't be written ({error.strerror})", file=sys.stderr)
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    _end(main(is_process=True, began_s=BEGAN_S))
