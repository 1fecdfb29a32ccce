"""What a run measured: counts, values, observations with percentiles, and series for the plots. Pure.

Names are dotted lower-case words with their unit last (`lookup_s`, `found.share`). Whatever is measured may say *of* whom it is (a
host or a session), and who still owes a number something, so that a failed check can name whose story to tell.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

OBSERVATIONS_AT_MOST = 2_000_000
SERIES_POINTS_AT_MOST = 200_000
STATISTICS = ("count", "mean", "min", "p50", "p90", "p99", "max")
"""What an observed name gives: ``lookup_s`` becomes ``lookup_s.p50`` and so on. Of nothing observed there is only the count."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values in ascending order, ``share`` in (0, 1]; never a value that wasn't observed."""
    if not ordered:
        raise ValueError("nothing was observed")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(slots=True)
class _Observed:
    values: array[float] = field(default_factory=lambda: array("d"))
    lowest: tuple[float, str] = (math.inf, "")
    highest: tuple[float, str] = (-math.inf, "")


@dataclass(frozen=True, slots=True)
class Series:
    """Points over virtual time: ``values[i]`` at ``times_s[i]``."""

    times_s: tuple[float, ...]
    values: tuple[float, ...]


class Metrics:
    """Collects; `numbers` and `series` are what came of it."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._culprits: dict[str, str] = {}
        self._debtors: dict[str, dict[str, None]] = {}
        self._observed: dict[str, _Observed] = {}
        self._series: dict[str, tuple[array[float], array[float]]] = {}
        self.dropped = 0
        """Observations and points over their bounds: a run that has some measured less than it seems."""

    def count(self, name: str, by: float = 1, of: str = "") -> None:
        """Add to a number that starts at 0; ``count(name, 0)`` makes it exist."""
        self._counts[name] = self._counts.get(name, 0) + by
        if of:
            self._culprits[name] = of

    def put(self, name: str, value: float, of: str = "") -> None:
        """Set a number."""
        self._counts[name] = value
        if of:
            self._culprits[name] = of

    def owed_by(self, name: str, whom: Iterable[str]) -> None:
        """Those by whom a number is broken that is too low or never comes, until they `gave`; others owe it nothing."""
        self._debtors[name] = dict.fromkeys(whom)

    def gave(self, name: str, of: str) -> None:
        """Owes ``name`` nothing any more."""
        self._debtors.get(name, {}).pop(of, None)

    def observe(self, name: str, value: float, of: str = "") -> None:
        """One of many values, of which the run reports `STATISTICS`."""
        observed = self._observed.get(name)
        if observed is None:
            observed = self._observed[name] = _Observed()
        if len(observed.values) >= OBSERVATIONS_AT_MOST:
            self.dropped += 1
            return
        observed.values.append(value)
        if value < observed.lowest[0]:
            observed.lowest = (value, of)
        if value > observed.highest[0]:
            observed.highest = (value, of)

    def expect(self, name: str) -> None:
        """Make an observed name exist before anything was observed, so that its count is 0 rather than unknown."""
        self._observed.setdefault(name, _Observed())

    def sample(self, name: str, at_s: float, value: float) -> None:
        """One point of a series over virtual time."""
        times, values = self._series.setdefault(name, (array("d"), array("d")))
        if len(times) >= SERIES_POINTS_AT_MOST:
            self.dropped += 1
            return
        times.append(at_s)
        values.append(value)

    def numbers(self) -> dict[str, float]:
        """Every number of the run by name, in order of names."""
        found = dict(self._counts)
        for name, observed in self._observed.items():
            ordered = sorted(observed.values)
            found[f"{name}.count"] = len(ordered)
            if ordered:
                found[f"{name}.mean"] = math.fsum(ordered) / len(ordered)
                found[f"{name}.min"], found[f"{name}.max"] = ordered[0], ordered[-1]
                for share in (50, 90, 99):
                    found[f"{name}.p{share}"] = percentile(ordered, share / 100)
        return dict(sorted(found.items()))

    def series(self) -> Mapping[str, Series]:
        """Every series by name, in order of names."""
        return {name: Series(tuple(times), tuple(values)) for name, (times, values) in sorted(self._series.items())}

    def observations(self) -> Mapping[str, tuple[float, ...]]:
        """Every observed value by name, in the order of observation; for histograms."""
        return {name: tuple(observed.values) for name, observed in sorted(self._observed.items())}

    def culprits(self, name: str, *, too_high: bool) -> tuple[str, ...]:
        """Whom a bound on ``name`` was broken by, if anybody said: those who owe it something, where it isn't too high; else the one
        whose value it was.
        """
        plain, _, statistic = name.rpartition(".")
        is_statistic = statistic in STATISTICS
        debtors = self._debtors.get(name) or (self._debtors.get(plain) if is_statistic else None)
        if debtors and not too_high:
            return tuple(debtors)
        observed = self._observed.get(plain) if is_statistic else None
        culprit = self._culprits.get(name, "")
        if observed is not None:
            _, culprit = observed.highest if too_high else observed.lowest
        return (culprit,) if culprit else ()
