"""Many runs of many scenarios, side by side, and what is said of them together.

Owns which runs are made (a seed twice, with two hash seeds, where sameness is asked for), their order (the longest first, so that
the last doesn't keep the others' cores idle), and the verdict.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from netsim.outcome import Outcome
from netsim.processes import HASH_SEEDS, Task, run_all
from netsim.report import Progress, duration_said, table
from netsim.runner import Prepared
from netsim.trace import DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """Some seeds of one scenario."""

    prepared: Prepared
    seeds: tuple[int, ...]
    is_twice: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a part: an outcome for each seed, and the pairs that weren't the same twice."""

    part: Part
    outcomes: tuple[Outcome, ...]
    different: tuple[tuple[Outcome, Outcome], ...]

    @property
    def passed(self) -> bool:
        return not self.different and all(outcome.passed for outcome in self.outcomes)

    @property
    def remark(self) -> str:
        """Whether it was the same twice; nothing where that wasn't asked for."""
        if self.different:
            return "NOT THE SAME TWICE"
        return "the same twice" if self.part.is_twice else ""


def run_parts(parts: Sequence[Part], jobs: int, plots: str = "", *, is_timed: bool = True) -> list[Result]:
    """Run everything, ``jobs`` at a time, with a progress bar on standard error."""
    tasks: list[tuple[int, Task]] = []
    for index, part in enumerate(parts):
        scenario = part.prepared.scenario
        for seed in part.seeds:
            for hash_seed in HASH_SEEDS if part.is_twice else ("",):
                task = Task(
                    part.prepared.file, seed, scenario.real_s_max, hash_seed, plots, is_timed, is_alone=scenario.alone
                )
                tasks.append((index, task))
    tasks.sort(key=lambda item: -item[1].real_s_max)
    progress = Progress(sys.stderr, f"{len(tasks)} runs")
    total_s = math.fsum(task.real_s_max for _, task in tasks)

    def on_change(done: Sequence[Task], running: Sequence[Task]) -> None:
        names = ", ".join(f"{Path(task.file).stem} seed {task.seed}" for task in running[:3])
        progress.show(math.fsum(task.real_s_max for task in done) / total_s, f"{len(done)} done; {names}")

    def on_done(task: Task, outcome: Outcome) -> None:
        verdict = "ok    " if outcome.passed else "FAILED"
        took = f"{outcome.real_s:.1f} s of a core, {outcome.wall_s:.1f} by the clock"
        progress.say(f"{verdict} {Path(task.file).stem}, seed {task.seed}: {took}")

    outcomes = run_all([task for _, task in tasks], jobs, on_change, on_done)
    progress.clear()
    found: list[dict[int, list[Outcome]]] = [{} for _ in parts]
    for (index, task), outcome in zip(tasks, outcomes, strict=True):
        found[index].setdefault(task.seed, []).append(outcome)
    return [_result(part, by_seed) for part, by_seed in zip(parts, found, strict=True)]


def _result(part: Part, by_seed: dict[int, list[Outcome]]) -> Result:
    pairs = [(runs[0], runs[-1]) for runs in (by_seed[seed] for seed in part.seeds)]
    different = tuple(pair for pair in pairs if pair[0].trace_hash != pair[1].trace_hash or not pair[0].trace_hash)
    worst = tuple(next((run for run in pair if not run.passed), pair[0]) for pair in pairs)
    return Result(part, worst, different if part.is_twice else ())


def hash_of(results: Sequence[Result]) -> str:
    """Of one run its own; of more, one over all of theirs in order."""
    hashes = [outcome.trace_hash for result in results for outcome in result.outcomes]
    return hashes[0] if len(hashes) == 1 else blake2b(" ".join(hashes).encode(), digest_size=DIGEST_BYTES).hexdigest()


def twice_lines(results: Sequence[Result]) -> list[str]:
    """Whether what was run twice was the same, of each part that was."""
    lines = []
    twice = [result for result in results if result.part.is_twice]
    for result in twice:
        for one, other in result.different:
            hashes = " and ".join(run.trace_hash or "none" for run in (one, other))
            lines.append(f"NOT THE SAME TWICE: {one.scenario}, seed {one.seed}: {hashes}")
            lines.append(f"  again: {one.replay} --twice")
        if not result.different:
            whose = f"{result.part.prepared.scenario.name}: " if len(twice) > 1 else ""
            runs = f"each of {len(result.outcomes)} runs"
            lines.append(f"{whose}{runs} was the same in two processes with two PYTHONHASHSEEDs")
    return lines


def campaign_lines(results: Sequence[Result]) -> list[str]:
    """A row for each part."""
    rows = [("scenario", "hosts", "seeds", "passed", "virtual time", "core s a seed", "clock s", "peak MiB", "")]
    for result in results:
        outcomes, scenario = result.outcomes, result.part.prepared.scenario
        mean_s = math.fsum(one.real_s for one in outcomes) / len(outcomes)
        wall_s = math.fsum(one.wall_s for one in outcomes) / len(outcomes)
        peak = max(one.peak_rss_mib for one in outcomes)
        verdict = (result.remark or "ok") if result.passed else "FAILED"
        rows.append((
            scenario.name, f"{scenario.host_count:,}", str(len(outcomes)), str(sum(one.passed for one in outcomes)),
            duration_said(max(one.virtual_s for one in outcomes)), f"{mean_s:.1f}",
            f"{wall_s:.1f}", f"{peak:,.0f}", verdict,
        ))  # fmt: skip
    return table(rows, right=range(1, 8), indent="")
