"""PNGs of one run: what happened over virtual time, and how long things took. Needs matplotlib (the extra `plots`).

Owns how things look, nothing of what they mean: names and units come from the metrics' names, titles from what the workload says of
them. A family of series by number (`coverage.0`, `coverage.1`) becomes a map of rows over time; other series become lines;
observations become distributions, those of a family (`recovery_s.kill`) together. Colours are Okabe and Ito's, told apart by all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import BoundaryNorm, ListedColormap

from netsim.metrics import Series, percentile
from netsim.outcome import Outcome

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
COVERAGE_COLOURS = ("#D55E00", "#F0E442", "#9BD0F5", "#56B4E9", "#0072B2", "#00304D")
"""Nothing, one, two, three, four, and five or more."""
GREY = "#6B6B6B"
SIZE_INCHES = (9.0, 4.6)
TITLE_CHARS = 68
"""A longer title gets a second line: labels to the left leave it little room."""
DOTS_PER_INCH = 130
UNITS = {
    "bytes_per_s": "bytes a second",
    "tokens_per_s": "tokens a second",
    "per_s": "a second",
    "mbit": "Mbit/s",
    "ms": "milliseconds",
    "s": "seconds",
    "bytes": "bytes",
    "share": "share",
}
LOG_FROM_RATIO = 100.0
TICKS_PER_ROWS = 24
LINES_AT_MOST = len(COLOURS)
MARKS = {
    "kill": "x",
    "power-off": "x",
    "freeze": "|",
    "sleep": "|",
    "stop": "v",
    "partition": "s",
    "degrade": "s",
    "reset": "s",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(outcome: Outcome, meanings: Mapping[str, str], directory: Path) -> list[Path]:
    """Every figure that the run's series and observations give; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(STYLE):
        for name, figure in _figures(outcome, meanings):
            file = directory / f"{outcome.scenario}-seed{outcome.seed}-{name.replace('.', '-')}.png"
            figure.savefig(file, dpi=DOTS_PER_INCH)
            plt.close(figure)
            files.append(file)
    return files


def _figures(outcome: Outcome, meanings: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    rows, lines = _families(outcome.series)
    for name, family in rows.items():
        yield name, _map(outcome, name, family, _meaning(f"{name}.*", meanings))
    for name, series in lines.items():
        yield name, _line(outcome, name, series, _meaning(name, meanings))
    for name, groups in _groups(outcome.observations).items():
        yield name, _distribution(outcome, name, groups, _meaning(name, meanings))


def _families(series: Mapping[str, Series]) -> tuple[dict[str, dict[int, Series]], dict[str, Series]]:
    """Series that differ by a number only, and the others."""
    rows: dict[str, dict[int, Series]] = {}
    lines: dict[str, Series] = {}
    for name, points in series.items():
        family, _, last = name.rpartition(".")
        if family and last.isdigit():
            rows.setdefault(family, {})[int(last)] = points
        else:
            lines[name] = points
    return rows, lines


def _groups(observations: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Sequence[float]]]:
    """Observed names with the members of their families."""
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for name, values in observations.items():
        family, _, last = name.rpartition(".")
        if not values:
            continue
        if family in groups:
            groups[family][last] = values
        else:
            groups[name] = {"all": values}
    return groups


def _meaning(name: str, meanings: Mapping[str, str]) -> str:
    plain, text = name.removesuffix(".*"), meanings.get(name, "")
    return f"{plain}: {text}" if text else plain


def _unit(name: str) -> str:
    last = name.rpartition(".")[2] if name.rpartition(".")[2] in UNITS else name
    return next((said for suffix, said in UNITS.items() if last == suffix or last.endswith(f"_{suffix}")), "")


def _canvas(outcome: Outcome, title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    axes.set_title(fill(title, TITLE_CHARS), pad=16)
    figure.text(
        0.995, 0.01, f"{outcome.scenario}, seed {outcome.seed}", ha="right", va="bottom", fontsize=8, color=GREY
    )
    return figure, axes


def _time_axis(axes: Any, outcome: Outcome) -> None:
    """Virtual time below, and what befell hosts as marks above it."""
    axes.set_xlim(0, max(outcome.virtual_s, 1e-9))
    axes.set_xlabel("virtual seconds")
    kinds = [kind for kind in dict.fromkeys(kind for _, kind in outcome.marks) if kind in MARKS][:LINES_AT_MOST]
    for index, kind in enumerate(kinds):
        moments = [at_s for at_s, marked in outcome.marks if marked == kind]
        colour = COLOURS[(index + 1) % len(COLOURS)]
        axes.plot(
            moments, [1.02] * len(moments), MARKS[kind], color=colour, markersize=5, clip_on=False, label=kind,
            transform=axes.get_xaxis_transform(), alpha=0.8,
        )  # fmt: skip
    if kinds:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(kinds), fontsize=8, handletextpad=0.1)


def _map(outcome: Outcome, name: str, family: Mapping[int, Series], title: str) -> Any:
    """Rows by number, colour by value, over time."""
    figure, axes = _canvas(outcome, title)
    colours = ListedColormap(list(COVERAGE_COLOURS))
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 1e9], len(COVERAGE_COLOURS))
    times: list[float] = list(next(iter(family.values())).times_s)
    ends = [*times[1:], max(outcome.virtual_s, times[-1])]
    edges = [*times, ends[-1]]
    numbers = sorted(family)
    height = min(len(times), *(len(points.values) for points in family.values()))
    cells = [list(family[number].values[:height]) for number in numbers]
    bounds = [number - 0.5 for number in numbers] + [numbers[-1] + 0.5]
    mesh = axes.pcolormesh(edges[: height + 1], bounds, cells, cmap=colours, norm=norm, rasterized=True)
    for number in numbers[1:]:
        axes.axhline(number - 0.5, color="white", linewidth=0.8 if len(numbers) <= TICKS_PER_ROWS else 0.2)
    step = max(1, math.ceil(len(numbers) / TICKS_PER_ROWS))
    axes.set_yticks(numbers[::step])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_ylabel("block" if name.startswith("coverage") else name)
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, 1, 2, 3, 4, 5], pad=0.02, shrink=0.8, aspect=14)
    bar.ax.set_yticks([0, 1, 2, 3, 4, 5e8], ["none", "1", "2", "3", "4", "more"])
    _time_axis(axes, outcome)
    return figure


def _line(outcome: Outcome, name: str, series: Series, title: str) -> Any:
    figure, axes = _canvas(outcome, title)
    is_whole = all(value == int(value) for value in series.values)
    if is_whole:
        axes.step(series.times_s, series.values, where="post", color=COLOURS[0], linewidth=1.6)
        axes.yaxis.get_major_locator().set_params(integer=True)
    elif _is_regular(series.times_s):
        axes.plot(series.times_s, series.values, color=COLOURS[0], linewidth=1.4)
    else:
        axes.plot(series.times_s, series.values, ".", color=COLOURS[0], markersize=4, alpha=0.6)
    low, high = min(series.values), max(series.values)
    if low > 0 and high / low > LOG_FROM_RATIO:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, low), top=1.05 * high if high > 0 else None)
    axes.set_ylabel(_unit(name))
    _time_axis(axes, outcome)
    return figure


def _is_regular(times_s: Sequence[float]) -> bool:
    """Whether points were taken at even intervals, so that a line between them means something."""
    steps = [after - before for before, after in pairwise(times_s)]
    return bool(steps) and max(steps) <= 1.5 * (math.fsum(steps) / len(steps))


def _distribution(outcome: Outcome, name: str, groups: Mapping[str, Sequence[float]], title: str) -> Any:
    """How values are distributed: the share up to each value, or for a family a row of points for each member."""
    figure, axes = _canvas(outcome, title)
    told = dict(list(groups.items())[:LINES_AT_MOST])
    if len(told) == 1:
        _shares(axes, next(iter(told.values())))
    else:
        _strips(axes, told)
    every = [value for values in told.values() for value in values]
    if min(every) > 0 and max(every) / min(every) > LOG_FROM_RATIO:
        axes.set_xscale("log")
    elif min(every) >= 0:
        axes.set_xlim(0, 1.03 * max(every) if max(every) > 0 else None)  # the largest isn't cut in half
    axes.set_xlabel(_unit(name) or name)
    return figure


def _shares(axes: Any, values: Sequence[float]) -> None:
    ordered = sorted(values)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    axes.step([ordered[0], *ordered], [0.0, *shares], where="post", color=COLOURS[0], linewidth=1.8)
    for share in (0.5, 0.9, 0.99):
        value = percentile(ordered, share)
        axes.plot(value, share, "o", color=COLOURS[1], markersize=5)
        axes.annotate(
            f"p{share * 100:.0f}  {value:.3g}", (value, share), xytext=(8, -4), textcoords="offset points",
            va="top", fontsize=9, color=COLOURS[1],
        )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99], ["0", "25 %", "50 %", "75 %", "90 %", "99 %"])
    axes.set_ylabel(f"share of {len(ordered):,}")


def _strips(axes: Any, groups: Mapping[str, Sequence[float]]) -> None:
    labels = []
    for row, (label, values) in enumerate(groups.items()):
        middle = percentile(sorted(values), 0.5)
        spread = [row + 0.16 * ((index % 5) - 2) / 2 for index in range(len(values))]
        axes.plot(values, spread, "o", color=COLOURS[row], markersize=5, alpha=0.65, markeredgewidth=0)
        axes.plot([middle, middle], [row - 0.32, row + 0.32], color=COLOURS[row], linewidth=2.4)
        labels.append(f"{label} ({len(values):,})\np50 {middle:.3g}, max {max(values):.3g}")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
