"""What a person reads of runs: the progress bar, one run in full, one table for many, the story of what failed. Pure, but for
`Progress`, which draws on a terminal and is silent in a file.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from typing import TextIO

from netsim.metrics import STATISTICS
from netsim.outcome import Checked, Outcome

BAR_CELLS = 30
STORY_INDENT = "      "
SEEDS_SAID = 8
CULPRITS_SAID = 6
_BLOCKS = " ▏▎▍▌▋▊▉█"


class Progress:
    """A bar that redraws itself in place; nothing at all where nobody looks (a file, a pipe)."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream = stream
        self._label = label
        self._is_drawn = stream.isatty()
        self._width = 0

    def show(self, share: float, note: str = "") -> None:
        if not self._is_drawn:
            return
        cells = max(0.0, min(1.0, share)) * BAR_CELLS
        whole = int(cells)
        bar = "█" * whole + (_BLOCKS[int((cells - whole) * 8)] if whole < BAR_CELLS else "")
        line = f"{self._label}  {bar:<{BAR_CELLS}}▕ {share:4.0%}  {note}"
        line = line[: max(1, shutil.get_terminal_size().columns - 1)]  # a line that wraps can't be redrawn
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def say(self, line: str) -> None:
        """A line that stays, above the bar; a file gets it too."""
        self.clear()
        self._stream.write(line + "\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._is_drawn and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def said(value: float | None) -> str:
    """A number as people read it: whole ones whole, others with three digits that count."""
    if value is None:
        return "never measured"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def duration_said(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Columns aligned, the first row as heading; ``right`` are the columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    lines.insert(1, indent + "  ".join("-" * width for width in widths))
    return lines


def run_lines(outcome: Outcome, about: str, *, full: bool = True) -> list[str]:
    """One run: its checks, what else was measured, what failed and why."""
    ratio = outcome.virtual_s / outcome.real_s if outcome.real_s > 0 else 0.0
    took = f"{duration_said(outcome.virtual_s)} of virtual time in {duration_said(outcome.real_s)} of one core"
    took += f", {duration_said(outcome.wall_s)} by the clock"
    events = f"{outcome.events:,} callbacks, {outcome.trace_lines:,} events traced"
    cost = f"({ratio:,.0f} times as fast), {events}, peak {outcome.peak_rss_mib:,.0f} MiB"
    lines = [f"{outcome.scenario}: {about}", f"  seed {outcome.seed}: {took} {cost}", ""]
    rows = [("check", "value", "bound", "")]
    rows += [(one.metric, said(one.value), one.bound, "ok" if one.holds else "FAILED") for one in outcome.checks]
    lines += table(rows, right=(1,))
    if full:
        lines += _measured_lines(outcome)
    if not outcome.passed:
        lines += ["", *failure_lines(outcome)]
    return lines


def _measured_lines(outcome: Outcome) -> list[str]:
    """Everything that was measured: observed names in one table with their statistics, plain numbers in another."""
    counted = [name.removesuffix(".count") for name in outcome.numbers if name.endswith(".count")]
    observed = [name for name in counted if f"{name}.p50" in outcome.numbers]
    told = {f"{name}.{statistic}" for name in observed for statistic in STATISTICS}
    plain = [(name, said(value)) for name, value in outcome.numbers.items() if name not in told]
    rows = [(name, *(said(outcome.numbers[f"{name}.{statistic}"]) for statistic in STATISTICS)) for name in observed]
    lines = ["", *table([("observed", *STATISTICS), *rows], right=range(1, 8))] if rows else []
    return lines + (["", *table([("measured", "value"), *plain], right=(1,))] if plain else [])


def failure_lines(outcome: Outcome) -> list[str]:
    """Why a run failed: sentences, stories, and the command that runs it again."""
    lines = [f"  FAILED: {outcome.scenario}, seed {outcome.seed}"]
    for one in outcome.checks:
        if not one.holds:
            verb = "was" if one.value is None else "is"
            lines.append(f"    {one.metric} {verb} {said(one.value)}, wanted {one.bound}{_whose(one.culprits)}")
    for failure in outcome.failures:
        first, *rest = failure.rstrip().splitlines() or [""]
        lines += [f"    {first}", *(f"    {line}" for line in rest)]
    for name, story in outcome.stories.items():
        whose = f"the story of {name}, its last {len(story)} lines" if name else "what happened last in the run"
        lines.append(f"    {whose}:")
        lines += [STORY_INDENT + line for line in story]
    lines.append(f"  again: {outcome.replay}")
    return lines


def _whose(culprits: Sequence[str]) -> str:
    if not culprits:
        return ""
    more = len(culprits) - CULPRITS_SAID
    return f" (of {', '.join(culprits[:CULPRITS_SAID])}{f' and {more} more' if more > 0 else ''})"


def seeds_lines(outcomes: Sequence[Outcome], about: str) -> list[str]:
    """Many seeds of one scenario in one table."""
    passed = [one for one in outcomes if one.passed]
    total_s = math.fsum(one.real_s for one in outcomes)
    peak = max(one.peak_rss_mib for one in outcomes)
    ran = f"{len(outcomes)} seeds ({_ranges(one.seed for one in outcomes)}), {len(passed)} passed"
    cost = f"{duration_said(total_s)} of one core, peak {peak:,.0f} MiB"
    lines = [f"{outcomes[0].scenario}: {about}", f"  {ran}; {cost}", ""]
    rows = [("check", "bound", "lowest", "median", "highest", "")]
    for metric, checks in _by_check(outcomes).items():
        values = sorted(check.value for _, check in checks if check.value is not None)
        broken = [seed for seed, check in checks if not check.holds]
        verdict = f"FAILED for {len(broken)}: {_ranges(broken)}" if broken else "ok"
        low, mid, high = (values[0], values[len(values) // 2], values[-1]) if values else (None, None, None)
        rows.append((metric, checks[0][1].bound, said(low), said(mid), said(high), verdict))
    lines += table(rows, right=(2, 3, 4))
    for one in [one for one in outcomes if not one.passed][:SEEDS_SAID]:
        lines += ["", *failure_lines(one)]
    return lines


def markdown_table(groups: Sequence[tuple[str, Sequence[Outcome]]]) -> list[str]:
    """A row for each scenario, for a document: what was bounded and what came out, over all its seeds, after a remark on it."""
    checked = "checked (lowest to highest over the seeds)"
    lines = [f"| scenario | seeds | passed | {checked} | core s a seed | clock s a seed | peak MiB |"]
    lines.append("|---|---:|---:|---|---:|---:|---:|")
    for remark, outcomes in groups:
        name = f"{outcomes[0].scenario}, {remark}" if remark else outcomes[0].scenario
        parts = []
        for metric, checks in _by_check(outcomes).items():
            known = [check.value for _, check in checks if check.value is not None]
            low, high = (said(min(known)), said(max(known))) if known else (said(None), said(None))
            parts.append(f"`{metric}` {low if low == high else f'{low} to {high}'} ({checks[0][1].bound})")
        passed = sum(one.passed for one in outcomes)
        real_s = math.fsum(one.real_s for one in outcomes) / len(outcomes)
        wall_s = math.fsum(one.wall_s for one in outcomes) / len(outcomes)
        cost = f"{real_s:.1f} | {wall_s:.1f} | {max(one.peak_rss_mib for one in outcomes):,.0f}"
        lines.append(f"| {name} | {len(outcomes)} | {passed} | {'; '.join(parts)} | {cost} |")
    return lines


def _by_check(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[int, Checked]]]:
    """The seeds' results of each check; a run whose process died has none."""
    found: dict[str, list[tuple[int, Checked]]] = {}
    for one in outcomes:
        for check in one.checks:
            found.setdefault(check.metric, []).append((one.seed, check))
    return found


def _ranges(seeds: Iterable[int]) -> str:
    """Numbers as ranges: 1-5, 7."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and parts[-1][1] == seed - 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join(told[:SEEDS_SAID]) + (", ..." if len(told) > SEEDS_SAID else "")
